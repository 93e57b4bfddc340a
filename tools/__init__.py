"""Commands around the scripts: demo, pictures, reproduction."""
