"""What each variable of `/weights` says."""

_BETWEEN = "between this reading and the one before (NaN the first time)"
_NAN = "(NaN where the audit doesn't find the weights to be what their names say)"
DESCRIPTIONS = {
    "parameter_norm": "length of all parameters of a part of a layer together; NaN for a part it doesn't have",
    "embedding_norm": "length of the embeddings of tokens, positions and types, with a norm on them; tied weights here",
    "unembedding_norm": "length of the parameters of the unembedding; NaN if it has none of its own, being tied",
    "final_norm_norm": "length of the parameters of the final norm; NaN without one",
    "total_norm": "length of all parameters, tied ones once",
    "total_norm_without_embeddings": "length of all parameters but those of embedding and unembedding",
    "qk_norm": f"Frobenius norm of W_Q W_K^T, without biases and rotation {_NAN}",
    "ov_norm": f"Frobenius norm of W_V W_O {_NAN}",
    "ov_copying": f"sum of the real parts over sum of the magnitudes of the eigenvalues of W_V W_O, -1 to 1 {_NAN}",
    "full_ov_copying": "the same of W_E W_V W_O W_U: whether tokens raise their own logit; norms, their gains and the "
    "MLPs left out (NaN also where W_U is not all there is between the final norm and the logits)",
    "ov_copying_null_mean": "mean of ov_copying for Gaussian W_V and W_O of the same sizes (32 draws, all heads alike)",
    "ov_copying_null_std": "standard deviation of ov_copying for Gaussian W_V and W_O of the same sizes",
    "full_ov_copying_null_mean": "mean of full_ov_copying for Gaussian W_V and W_O with the model's own W_E and W_U",
    "full_ov_copying_null_std": "standard deviation of full_ov_copying for Gaussian W_V and W_O",
    **{
        f"{kind}_composition": "||M1 M2|| / (||M1|| ||M2||) in Frobenius norms, M1 = W_V W_O of head (written), M2 = "
        f"{read} of head_to (read), gains of the norms around attention included, biases, rotation and MLPs left out; "
        f"NaN unless layer_to > layer, and {_NAN[1:-1]}"
        for kind, read in (("q", "W_Q W_K^T"), ("k", "W_K W_Q^T"), ("v", "W_V W_O"))
    },
    **{
        f"{kind}_composition_z": f"standard deviations that the square of {kind}_composition lies above its mean had "
        "head_to been turned at random in the stream (in closed form)"
        for kind in "qkv"
    },
    "composition_chance": "root of the mean squared composition of heads turned at random: 1 / sqrt(d_model)",
    "step_norm": f"length of the change of a part's parameters {_BETWEEN}",
    "alignment": f"cosine of the parameters with their change {_BETWEEN}",
    "direction_cosine": f"cosine of the parameters then and now, {_BETWEEN}",
    "total_step_norm": f"length of the change of all parameters {_BETWEEN}",
    "total_alignment": f"cosine of all parameters with their change {_BETWEEN}",
    "total_direction_cosine": f"cosine of all parameters then and now, {_BETWEEN}",
}
