"""Any circuit under ablations of everything else: plain, random, and adversarial.

>>> audit_circuit(None, model, tokens, nodes, metric).to_pandas()                # doctest: +SKIP
"""

from tl_vpd.analysis.audit.audit import CircuitAudit, audit_circuit
from tl_vpd.analysis.audit.config import AuditConfig, RepairConfig
from tl_vpd.analysis.audit.repair import Repair, repair_circuit

__all__ = ["AuditConfig", "CircuitAudit", "Repair", "RepairConfig", "audit_circuit", "repair_circuit"]
