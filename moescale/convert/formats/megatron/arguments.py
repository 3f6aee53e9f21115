"""Megatron's arguments, as its training script keeps them beside the weights: what they mean for the model.

Each argument is read, or must have a value that leaves the model as MoEScale computes it, or is known not to change
what a model computes from its weights. One that is none of these is refused where it is set, by its name: it may be
newer than this list, or somebody's own. Gathered from Megatron-LM 2.5 to 0.20, parser and configuration classes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.config import ConfigError


def words(text: str) -> frozenset[str]:
    """List the words of a text."""
    return frozenset(text.split())


READ = words("""
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels
    vocab_size padded_vocab_size seq_length normalization norm_epsilon layernorm_epsilon position_embedding_type
    rotary_base swiglu window_size untie_embeddings_and_output_weights num_experts moe_layer_freq moe_router_topk
    moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_score_function moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias
    moe_router_bias_update_rate moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
    moe_input_jitter_eps moe_expert_capacity_factor moe_token_drop_policy micro_batch_size global_batch_size
    tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size expert_tensor_parallel_size
""")
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what changes the model, and the values at which it does not; none is one too
    **dict.fromkeys(words("""
        add_bias_linear add_qkv_bias apply_layernorm_1p apply_residual_connection_post_layernorm attention_output_gate
        enable_mhc_connections gated_linear_unit is_hybrid_model layernorm_zero_centered_gamma
        moe_apply_probs_on_input moe_extended_tp moe_router_force_load_balancing moe_shared_expert_gate
        moe_token_dropping mtp_standalone multi_latent_attention onnx_safe openai_gelu qk_l2_norm qk_layernorm
        quick_geglu retro_add_retriever rotary_interleaved squared_relu use_legacy_models use_mup use_rope_scaling
    """), (False,)),
    **dict.fromkeys(words("""
        activation_func activation_func_clamp_value experimental_attention_variant heterogeneous_block_specs
        heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path hybrid_layer_pattern
        hybrid_override_pattern linear_attention_freq moe_expert_rank_capacity_factor moe_latent_size
        moe_mlp_glu_interleave_size moe_router_force_biased moe_router_topk_limited_devices
        moe_shared_expert_glu_interleave_size mrope_section num_moe_experts softmax_scale spec window_attn_skip_freq
    """), (False, "", [])),
    **dict.fromkeys(words("""
        rotary_percent rotary_seq_len_interpolation_factor mup_attn_scale_power mup_embedding_mult mup_output_mult
        mup_width_mult
    """), (1,)),
    **dict.fromkeys(words("""
        glu_linear_offset hybrid_attention_ratio hybrid_mlp_ratio mtp_num_layers no_rope_freq
    """), (0,)),
    "softmax_type": ("vanilla",),
}
HARMLESS = words("""
    DDP_impl _cpu_offloading_context _is_global_batch_size_explicitly_specified
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32
    activation_func_fp8_input_store activation_offload_fraction add_position_embedding adlr_autoresume
    adlr_autoresume_interval align_grad_reduce align_param_gather allow_ambiguous_pad_tokens allow_transformer_engine
    app_tag_run_name app_tag_run_version apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm
    async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm async_save async_strategy
    async_tensor_model_parallel_allreduce attention_backend attention_dropout attention_softmax_in_fp32
    auto_detect_ckpt_format autocast_dtype barrier_with_L1_time batch_invariant_backend batch_invariant_mode
    batch_p2p_comm batch_p2p_sync batch_size bert_binary_head bert_embedder_type bert_load beta_fast beta_slow bf16
    bias_activation_fusion bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion biencoder_projection_dim
    biencoder_shared_query_context_model block_data_path cache_mla_latents calc_ft_timeouts calculate_per_token_loss
    chat_template check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
    check_weight_hash_across_dp_replicas_interval checkpoint_activations checkpoint_num_layers classes_fraction
    clip_grad clone_scatter_output_in_embedding config_logger_dir consumed_train_bins consumed_train_samples
    consumed_valid_samples context_parallel_size cp_comm_type cpu_offloading create_all_gather_group
    create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion curr_iteration
    data_args_path data_cache_path data_impl data_parallel_random_init data_parallel_sharding_strategy
    data_parallel_size data_path data_per_class_fraction data_sharding deallocate_pipeline_outputs
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
    decoder_seq_length decoupled_lr decoupled_min_lr decrease_batch_size_if_needed defer_embedding_wgrad_compute
    delay_grad_reduce delay_offload_until_cuda_graph delay_param_gather delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models deterministic_mode
    disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser disable_mamba_mem_eff_path
    disable_msc_deprecated disable_parameter_transpose_cache disable_straggler_on_startup
    disable_symmetric_registration disable_tp_comm_overlap_ag disable_tp_comm_overlap_rs
    distrib_optim_fully_reshardable_mem_efficient distribute_checkpointed_activations distribute_saved_activations
    do_test do_train do_valid dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
    dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
    dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq
    dsa_indexer_use_sparse_loss dsa_kernel_backend dump_param_to_param_group_map embedding_init_method
    embedding_init_method_std embedding_path empty_unused_memory_level enable_autocast enable_chunked_prefill
    enable_cuda_graph enable_experimental enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups
    enable_msc enable_one_logger encoder_num_layers encoder_pipeline_model_parallel_size encoder_seq_length
    encoder_tensor_model_parallel_size end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release
    error_injection_rate error_injection_type eval_global_batch_size eval_interval eval_iters eval_micro_batch_size
    evidence_data_path exp_avg_dtype exp_avg_sq_dtype experimental_attention_variant_loss_scale_func
    expert_gtp_weight_remat_size expert_tensor_parallel_num_weight_shards external_cuda_graph fake_process_group
    finalize_model_grads_func fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
    finetune first_last_layers_bf16 first_pipeline_num_layers flash_attention_version flash_decode fp16
    fp16_lm_cross_entropy fp32_residual_connection fp4 fp8 freeze_all_layers ft_num_warmup_iters full_validation
    fused_residual_rmsnorm fused_single_qkv_rope gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute
    gdp_num_householder gpu_sniff_test_interval grad_reduce_in_bf16 grad_scale_func grad_sync_func
    gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult hetereogenous_dist_checkpoint hidden_dropout
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream high_priority_stream_groups
    hybrid_context_parallel hysteresis ict_head_size ict_load img_dim img_h img_w init_method init_method_std
    init_method_xavier_uniform init_model_with_meta_device initial_loss_scale iter_per_epoch iteration
    iterations_to_skip keep_fp8_transpose_cache keep_fp8_transpose_cache_when_using_custom_fsdp kv_lora_rank
    last_pipeline_num_layers lazy_mpu_init legacy_tokenizer linear_conv_kernel_dim linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim lion_beta1 lion_beta2 load
    load_main_params_from_ckpt load_model_opt_format local_rank logging_level logit_dtype loss_scale loss_scale_window
    lr main_grads_dtype main_params_dtype make_vocab_size_divisible_by mamba_head_dim
    mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
    mamba_state_dim mamba_training_ssm_states_dtype manual_gc mask_factor mask_prob mask_type masked_softmax_fusion
    max_position_embeddings max_seqlen_per_dp_cp_rank max_tokens_to_oom memory_efficient_layer_norm
    memory_snapshot_path merge_file metadata_path mhc_init_gating_factor mhc_num_residual_streams
    mhc_recompute_layer_num mhc_sinkhorn_iterations microbatch_group_size_per_vp_stage mid_level_dataset_surplus
    min_loss_scale min_lr min_offloaded_tensor_size mla_down_proj_fusion mlp_chunks_for_prefill
    mlp_chunks_for_training mmap_bin_files mmap_warmup mock_data model_parallel_size model_type modelopt_enabled
    moe_combine_bwd_dtype moe_dispatch_fwd_dtype moe_enable_deepep moe_enable_routing_replay
    moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grad_scale_func moe_grouped_gemm moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_per_layer_logging
    moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_dtype moe_router_fusion moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_router_quantile_balancing_ema moe_shared_expert_overlap
    moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type moe_upcycling_granularity
    moe_use_grouped_tensor moe_use_legacy_grouped_gemm moe_use_upcycling mscale mscale_all_dim mtp_detach_heads
    mtp_grad_scale_func mtp_hsm mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_use_repeated_layer
    multiple_validation_sets mup_base_head_dim mup_base_hidden_size no_load_optim no_load_rng no_persist_layer_norm
    no_save_optim no_save_rng no_sync_func no_weight_decay_cond_type num_channels num_classes
    num_dataset_builder_threads num_distributed_optimizer_instances num_floating_point_operations_so_far
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints num_speculative_tokens num_virtual_stages_per_pipeline_rank
    num_workers nvtx_ranges object_storage_cache_path offload_modules offset_sampling_seed_by_dp_rank optimizer
    original_max_position_embeddings outer_dp_sharding_strategy output_bert_embeddings output_layer_init_method
    override_ckpt_iteration override_lr_scheduler override_opt_param_scheduler pad_vocab_size param_sync_func
    params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path perform_initialization perform_rl_step
    persist_layer_norm phase_transition_iterations pin_cpu_grads pin_cpu_params pipeline_dtype
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_split_rank
    pretrained_checkpoint profile q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim qk_pos_emb_head_dim
    quant_recipe query_in_block_prob rampup_batch_size rank record_memory_history record_shapes refit_method
    relative_attention_max_distance relative_attention_num_buckets renormalize_blend_weights replication
    replication_factor replication_jump rerun_mode reset_attention_mask reset_position_ids
    result_rejected_tracker_filename retro_attention_gate retro_bert_tokenizer_type retro_bert_vocab_file
    retro_block_size retro_chunk_length retro_cyclic_train_iters retro_encoder_attention_dropout
    retro_encoder_hidden_dropout retro_encoder_layers retro_neighbor_dirs retro_num_neighbors
    retro_num_retrieved_chunks retro_project_dir retro_return_doc_ids retro_split_preprocessing
    retro_verify_neighbor_count retro_workdir reuse_grad_buf_for_mxfp8_param_ag rope_scaling_factor rope_type
    rotary_scaling_factor run_workload_inspector_server s3_cache_path sample_rate save
    scatter_gather_tensors_in_pipeline seed sequence_parallel sft sft_tokenizer_prompt_format sgd_momentum
    sharp_enabled_group short_seq_prob skip_train skipped_train_samples special_tokens split
    standalone_embedding_stage start_eval_at_iter start_weight_decay step_batch_size_schedule stream_ckpt_dequant
    strict_fsdp_dtensor_load suggested_communication_unit_size swin_backbone_type symmetric_ar_type
    te_precision_config_file te_rng_tracker tensor_parallel_num_weight_shards test_data_path test_mode timers
    timing_log_level timing_log_option titles_data_path torch_fsdp2_reshard_after_forward tp_only_amax_red
    train_data_path train_iters train_samples train_sync_interval transformer_impl
    transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args use_checkpoint_lr_scheduler
    use_checkpoint_opt_param_scheduler use_contiguous_buffers_in_ddp use_cpu_initialization use_custom_fsdp
    use_dist_ckpt use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn use_fused_weighted_squared_relu
    use_gigatoken use_gloo_process_groups use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    use_inference_optimized_layers use_kitchen use_kitchen_attention use_layer_wise_distributed_optimizer
    use_layer_wise_param_layout use_legacy_static_engine use_mamba_mem_eff_path use_mcore_models use_megatron_fsdp
    use_mp_args_from_checkpoint_args use_one_sent_docs use_persistent_ckpt_worker use_precision_aware_optimizer
    use_pytorch_profiler use_ring_exchange_p2p use_rotary_position_embeddings use_sharp use_te_activation_func
    use_te_rng_tracker use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
    use_tp_pp_dp_mapping use_transformer_engine_op_fuser v_head_dim valid_data_path validation_set_names
    variable_seq_lengths verify_integrity virtual_pipeline_model_parallel_size vision_backbone_type vision_pretraining
    vision_pretraining_type vocab_extra_ids vocab_file warmup weight_decay weight_decay_incr_style
    wgrad_deferral_limit world_size yaml_cfg yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    yarn_original_max_position_embeddings
""")
HARMLESS_FAMILIES = tuple(words("""
    wandb_ tensorboard_ log_ rl_ grpo_ langrl_ inference_ ckpt_ dino_ one_logger_ fault_injector_ flight_recorder_
    inprocess_ logits_ save_ fim_ muon_ lr_ adam_ megatron_fsdp_ ddp_ tp_comm_ fp8_ fp4_ cpu_offloading_ cuda_graph_
    recompute_ tokenizer_ tiktoken_ profile_ optimizer_ overlap_ exit_ dist_ckpt_ moe_routing_trace_ moe_paged_stash_
    moe_hybridep_ moe_deepep_ moe_ncclep_ otel_ straggler_ nccl_ gtp_ pytorch_profiler_ non_persistent_ retriever_
    dataloader_ fsdp_ distributed_ null_tokenizer_ kitchen_ indexer_ manual_gc_
"""))
UNSET: tuple[Any, ...] = (None, False, 0, "", [], (), {})


def refuse_unknown(arguments: Mapping[str, Any], source: str) -> None:
    """Refuse by name each argument that changes the model, or may do so. Raises ConfigError."""
    refuse_changes(arguments, source)
    for name, value in arguments.items():
        known = name in READ or name in HARMLESS or name in NEUTRAL or name.startswith(HARMLESS_FAMILIES)
        if not known and value not in UNSET:
            raise ConfigError(f"{source}: {name}={value!s:.80} is no argument of which MoEScale knows that it leaves "
                              "the model as it is: if it does, save the checkpoint without it")


def refuse_changes(arguments: Mapping[str, Any], source: str) -> None:
    """Refuse by name each argument that is known to change the model. Raises ConfigError."""
    for name, value in arguments.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise ConfigError(f"{source}: {name}={value!s:.80} cannot be expressed by MoEScale")
