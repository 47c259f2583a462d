package probe

import (
	"context"

	"github.com/ckagent/ckagent/bpf/load"
)

// Result is the outcome of one probe.
type Result struct {
	Name   string // short and stable: "btf", "tp_btf/page_fault_user", "tcx", ...
	OK     bool
	Detail string // what was seen, or the kernel's answer
	Costs  string // what is lost without it; empty if OK
	Mend   string // what would bring it; empty if OK
	Err    error  // why not; nil if OK
}

// probes in the order they are reported.
var probes = []struct {
	name  string
	run   func(context.Context) (detail string, err error)
	costs string
	mend  string
}{
	{"capabilities", capabilities,
		"no BPF program can be loaded: no copy-before-write in the kernel, no dirty log, no traffic signals",
		"run as root, or grant CAP_BPF and CAP_PERFMON (and CAP_NET_ADMIN for traffic signals)"},
	{"btf", kernelBTF,
		"programs cannot be fitted to this kernel: no BPF at all",
		"a kernel with CONFIG_DEBUG_INFO_BTF=y (/sys/kernel/btf/vmlinux)"},
	{"ring_buffer", ringBuffer,
		"captured pages cannot leave the kernel: no copy-before-write in the kernel",
		"Linux 5.8 or later"},
	{"tp_btf/page_fault_user", pageFaultUser,
		"faults cannot be seen before they are resolved: no copy-before-write in the kernel and no exact dirty-rate signal; userfaultfd does the work",
		"Linux 5.5 or later with CONFIG_BPF_EVENTS=y"},
	{"bpf_timer", bpfTimer,
		"idle slots of a VM's traffic cannot be timed in the kernel",
		"Linux 5.15 or later"},
	{"tcx", tcx,
		"request and answer of a VM's traffic cannot be paired: checkpoints are not placed into idle slots",
		"Linux 6.6 or later with CONFIG_NET_XGRESS, and CAP_NET_ADMIN"},
	{"fentry", fentry,
		"nothing that matters: hooks on kernel functions are an optional refinement of the fault tracepoints",
		"Linux 5.5 or later with CONFIG_FUNCTION_TRACER, not in lockdown confidentiality mode"},
	{"signal dirty", dirtySignal,
		"no live count of written pages between two scans; the page map alone is used",
		"Linux 6.6 or later with BTF; not in lockdown confidentiality mode"},
	{"signal vcpu", vcpuSignal,
		"no idle slots of vCPUs; run and wait times come from /proc/PID/task/TID/schedstat",
		"Linux 6.6 or later with BTF; not in lockdown confidentiality mode"},
	{"signal disk", diskSignal,
		"disk writes by file are not counted, or not those by io_uring; write_bytes of /proc/PID/io is used, or what the other ways write",
		"Linux 6.16 or later with BTF for io_uring, 6.6 for the rest; not in lockdown confidentiality mode"},
	{"signal net", netSignal,
		"no packets, requests, stalls and idle slots of taps; traffic is counted by sockets where QEMU itself is the network",
		"Linux 6.6 or later, and CAP_NET_ADMIN"},
	{"signal sock", sockSignal,
		"no network figures of VMs without a tap",
		"Linux 6.6 or later with BTF; not in lockdown confidentiality mode"},
}

// Names are the names of all probes, in order.
func Names() []string {
	var out []string
	for _, p := range probes {
		out = append(out, p.name)
	}
	return out
}

// All runs every probe; it ends early only if ctx does, and then marks the rest
// as failed for that reason.
func All(ctx context.Context) []Result {
	out := make([]Result, 0, len(probes))
	for _, p := range probes {
		r := Result{Name: p.name}
		err := ctx.Err()
		if err == nil {
			r.Detail, err = p.run(ctx)
		}
		if err == nil {
			r.OK = true
		} else {
			r.Err, r.Detail, r.Costs, r.Mend = err, load.Explain(err), p.costs, p.mend
		}
		out = append(out, r)
	}
	return out
}
