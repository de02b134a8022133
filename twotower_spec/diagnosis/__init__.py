"""Diagnosis of a drafter, a verifier and the machine: what is wrong, and what to do."""

from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.examination import examine
from twotower_spec.diagnosis.finding import Finding, Verdict

__all__ = ["Case", "Finding", "Verdict", "examine"]
