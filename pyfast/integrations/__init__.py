"""pyfast inside other trainers: :mod:`pyfast.integrations.transformers` and :mod:`pyfast.integrations.trl`.

Neither library is imported until its module is.
"""
