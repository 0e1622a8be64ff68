"""Research on the product: experiments whose variants live here, not in the installed package.

science_questions, accuracy    the studies
questions, training, scoring   what they share: packed questions, replicas of a method, losses of their targets
runs                           their records
"""
