from msa2net.runtimes import Predictor

__all__ = ["Predictor"]
