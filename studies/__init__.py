"""Research on the product: experiments whose variants live here, not in the installed package.

science_questions, accuracy    accuracy of the methods, and of variants of AdaFuse
drift                          rounding errors of the decoding strategy *switch*
questions, training, scoring   modules of both accuracy studies: packed questions, replicas of a method, losses of targets
carried                        a model in parts that fit a transfer
runs                           records of the accuracy studies
results                        records, tables and plots, by device
"""
