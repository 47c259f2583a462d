// Package bpf is the roof over the project's programs for the kernel: what is
// loaded into it lives in the packages below, one object per concern, each with
// its C source (*.bpf.c), the object compiled from it (committed, so that building
// the project needs no clang) and a loader.
//
// The sources include nothing but bpf/headers: hand-written declarations of the
// few helpers and kernel types used, relocated against the running kernel's BTF
// (CO-RE). `make generate` (go generate ./bpf/...) rebuilds every object; with
// clang 14 the result is the same byte for byte wherever the tree lies, so that
// CI can compare it with what is committed.
//
// Packages under bpf import nothing of the project. Loading needs CAP_BPF and
// CAP_PERFMON (or CAP_SYS_ADMIN); everything loaded goes away with the process
// that loaded it, as nothing is ever pinned.
package bpf
