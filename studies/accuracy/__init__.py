"""Comparison of pre-gated experts with LoRA: arms of equal cost on a mixture of tasks that need different skills.

made_up      two invented languages that contradict each other
tasks        the eight sets, their splits, and what each is scored by
mixture      the sets as tokens, in one file
pregated     AdaFuse's variants: routers that are known before layer 0
context      what those routers may see beside the token
arms         name → settings of its adapter
scoring      losses → a set's measures → its score → the mixture's mean
generation   greedy decoding of several runs at once
programs     programming problems and pass@1
sandbox      programs of a model, each in a process that can do no harm
expert_use   shares of the experts by set
study        the runs
report       the tables
pictures     accuracy against decoding cost, and expert use
"""
