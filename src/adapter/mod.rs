//! Trained parameters -> a PEFT folder, and back.
