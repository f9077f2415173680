"""What a trained model is worth: perplexity on WikiText, and GLUE after fine-tuning."""
