package net

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -type device -cflags "-O2 -g -Wall -Werror -Wno-unused-variable -mcpu=v3 -nostdinc -I../headers" objects net.bpf.c
