"""Research on the product: experiments whose variants live here, not in the installed package."""
