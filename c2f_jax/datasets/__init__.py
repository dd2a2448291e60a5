"""Which data sets there are, and how each is made."""
