"""Every method on three sets of science questions, alone and mixed; and ablations of AdaFuse.

methods         name → settings of its adapter; the ablations
study           the runs, one after the other
token_classes   classes of tokens, and the experts that each uses
report          tables and plots
"""
