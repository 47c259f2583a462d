// Package probe finds out what of BPF this kernel gives this process, by doing
// it: each probe loads a tiny program, runs it where that is possible without
// disturbing anybody, and unloads it. Asking the kernel's version or
// configuration would not tell: a lockdown, a missing capability or a
// distribution's patch shows only in the attempt.
//
// Probes are independent, hold nothing afterwards and may run at once. A probe
// that fails is a result, not an error: it carries what the kernel answered, what
// the project loses by it, and how to mend it. Programs are attached to tracing
// hooks for some microseconds, and to a network device only inside a network
// namespace made for the purpose.
package probe
