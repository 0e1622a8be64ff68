"""Comparison of pre-gated experts with LoRA: arms of equal cost on a mixture of tasks that need different skills.

made_up      two invented languages that contradict each other
tasks        the eight sets, their splits, and what each is scored by
mixture      the sets as tokens, in one file
pregated     AdaFuse's variants: routers that are known before layer 0
arms         name → settings of its adapter
scoring      losses → a set's measures → its score → the mixture's mean
generation   greedy decoding of several runs at once
study        the runs
report       the tables
"""
