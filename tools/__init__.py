"""Commands around the scripts: demo, figures, failure case, export."""
