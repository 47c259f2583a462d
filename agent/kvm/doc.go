// Package kvm makes bare virtual machines with one vCPU, to find out what KVM on this
// host is worth. It is no virtual machine monitor: there are no devices, and a guest
// that exits for any reason is at its end.
//
// A Machine belongs to one goroutine; Run blocks its thread until the guest exits or a
// signal comes. Memory is the caller's and must outlive the machine. x86-64 only.
package kvm
