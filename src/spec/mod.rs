//! What was asked: flags, environment, YAML. Strings and where they stood; unknown keys are refused.
