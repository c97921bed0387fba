"""What the campaign of wrong calls is made of: values, kinds of arguments, the table of public calls, and the judge."""
