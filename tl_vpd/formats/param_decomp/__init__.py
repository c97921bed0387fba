"""The authors' runs: the torch format of ``goodfire-ai/param-decomp``, read and written."""

from tl_vpd.formats.param_decomp.certificate import Certificate, certify
from tl_vpd.formats.param_decomp.importing import import_run
from tl_vpd.formats.param_decomp.load import load_param_decomp
from tl_vpd.formats.param_decomp.save import save_param_decomp

__all__ = ["Certificate", "certify", "import_run", "load_param_decomp", "save_param_decomp"]
