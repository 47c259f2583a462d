package doctor

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/uffd"
)

// onlyStopped is what the lack of a kernel feature that mode cow needs costs.
const onlyStopped = "no checkpoint while the VM runs (mode cow), modes stop and buffer only"

// serverMemory is what the fault server of one VM locks at most.
const serverMemory = 256 << 20

// Judge turns what was found into a report. It does nothing else.
func Judge(f *Facts) *Report {
	r := &Report{Schema: Schema, Kernel: f.Kernel, Arch: f.Arch}
	r.Checks = append(r.Checks, judgeKernel(f)...)
	r.Checks = append(r.Checks, judgeBPF(f)...)
	r.Checks = append(r.Checks, judgeHost(f)...)
	r.Checks = append(r.Checks, judgeRights(&f.Rights)...)
	r.Checks = append(r.Checks, judgeQEMU(f)...)
	r.Checks = append(r.Checks, judgeStore(&f.Store)...)
	r.Status = overall(r.Checks)
	r.Engines = judgeEngines(f, r)
	r.Store = StoreReport{
		Path: f.Store.Path, Filesystem: f.Store.FSType, FreeBytes: f.Store.FreeBytes, TotalBytes: f.Store.TotalBytes,
		FsyncMedianNS: f.Store.SyncMedian.Nanoseconds(), FsyncMaxNS: f.Store.SyncMax.Nanoseconds(), MeasuredDirectory: f.Store.Probed,
	}
	return r
}

func judgeKernel(f *Facts) []Check {
	u := &f.Uffd
	var out []Check
	add := func(c Check) { c.Group = "kernel"; out = append(out, c) }

	arch := Check{Name: "architecture", Status: OK, Required: true, Detail: f.Arch}
	if f.Arch != "amd64" {
		arch.Status = Missing
		arch.Costs = "a running VM cannot be taken under protection: system calls are injected on x86-64 only"
		arch.Mend = "an x86-64 host"
	}
	add(arch)

	c := Check{Name: "userfaultfd", Required: true}
	switch {
	case u.DeviceErr == nil:
		c.Status, c.Detail = OK, "by "+uffd.DevicePath
	case u.SyscallErr == nil && u.Unprivileged == 1:
		c.Status, c.Detail = OK, "by system call (vm.unprivileged_userfaultfd=1)"
	case u.SyscallErr == nil:
		c.Status, c.Detail = Limited, "by system call only; "+reason(u.DeviceErr)
		c.Costs = "a QEMU that does not run as root may not make one and is refused"
		c.Mend = "Linux 6.1 or later with access to " + uffd.DevicePath + ", or sysctl vm.unprivileged_userfaultfd=1"
	default:
		c.Status, c.Detail = Missing, reason(u.SyscallErr)
		c.Costs = "no checkpoint while the VM runs (mode cow) and no lazy restore"
		c.Mend = "CONFIG_USERFAULTFD=y, and run as root"
	}
	add(c)

	c = Check{Name: "write protection, anonymous", Required: true, Status: OK, Detail: "synchronous"}
	if !u.Features.Has(uffd.FeaturePagefaultFlagWP) || u.WPAnonErr != nil {
		c.Status, c.Detail = Missing, lacks(u, uffd.FeaturePagefaultFlagWP, u.WPAnonErr)
		c.Costs, c.Mend = "no checkpoint while the VM runs: modes stop and buffer only", "Linux 5.7 or later on x86-64"
	}
	add(c)

	c = Check{Name: "write protection, shared", Status: OK, Detail: "memfd and tmpfs"}
	if !u.Features.Has(uffd.FeatureWPHugetlbfsShmem) || u.WPSharedErr != nil {
		c.Status, c.Detail = Missing, lacks(u, uffd.FeatureWPHugetlbfsShmem, u.WPSharedErr)
		c.Costs = "VMs whose RAM is a memfd or lies on tmpfs: modes stop and buffer only"
		c.Mend = "Linux 5.19 or later with CONFIG_PTE_MARKER_UFFD_WP=y"
	}
	add(c)

	c = Check{Name: "marks on absent pages", Status: OK, Detail: "WP_UNPOPULATED"}
	if !u.Features.Has(uffd.FeatureWPUnpopulated) {
		c.Status, c.Detail = Missing, lacks(u, uffd.FeatureWPUnpopulated, nil)
		c.Costs = "anonymous RAM that the guest never touched cannot be write-protected: " + onlyStopped
		c.Mend = "Linux 6.4 or later"
	}
	add(c)

	c = Check{Name: "asynchronous tracking", Status: OK, Detail: "WP_ASYNC"}
	if !u.Features.Has(uffd.FeatureWPAsync) {
		c.Status, c.Detail = Missing, lacks(u, uffd.FeatureWPAsync, nil)
		c.Costs = "what a VM writes between two checkpoints cannot be tracked: every checkpoint is a full one"
		c.Mend = "Linux 6.7 or later"
	}
	add(c)

	c = Check{Name: "PAGEMAP_SCAN", Status: OK, Detail: "answers"}
	if !f.Scan {
		c.Status, c.Detail = Missing, "not in this kernel"
		c.Costs = "what a write-protected page went through cannot be proved in the time there is: " + onlyStopped +
			"; page tables are read entry by entry, pages that are mapped to the zero page count as used"
		c.Mend = "Linux 6.7 or later"
	}
	add(c)

	c = Check{Name: "missing faults", Required: true, Status: OK, Detail: "anonymous and shared memory"}
	switch {
	case u.MissingAnonErr != nil && u.MissingSharedErr != nil:
		c.Status, c.Detail = Missing, reason(u.MissingAnonErr)
		c.Costs, c.Mend = "no lazy restore: the whole RAM is read before the guest runs", "a kernel with userfaultfd, and the right to use it"
	case u.MissingAnonErr != nil || u.MissingSharedErr != nil:
		c.Status, c.Detail = Limited, "only one of anonymous and shared memory"
		c.Costs, c.Mend = "some VMs restore eagerly only", "Linux 4.11 or later"
	}
	add(c)

	c = Check{Name: "announced discards", Status: OK, Detail: "EVENT_REMOVE"}
	if !u.Features.Has(uffd.FeatureEventRemove) {
		c.Status, c.Detail = Missing, lacks(u, uffd.FeatureEventRemove, nil)
		c.Costs = "a balloon that inflates during a checkpoint of shared RAM goes unnoticed: such VMs need mode stop"
		c.Mend = "Linux 4.11 or later"
	}
	add(c)

	c = Check{Name: "collapse of split pages", Status: OK, Detail: "MADV_COLLAPSE"}
	if f.Collapse != nil {
		c.Status, c.Detail = Missing, reason(f.Collapse)
		c.Costs = "huge pages split by a checkpoint stay split until the kernel's own daemon finds them"
		c.Mend = "Linux 6.1 or later with transparent huge pages"
	}
	add(c)
	return out
}

func judgeBPF(f *Facts) []Check {
	var out []Check
	for _, p := range f.BPF {
		c := Check{Group: "bpf", Name: p.Name, Status: OK, Detail: p.Detail}
		if !p.OK {
			c.Status, c.Costs, c.Mend = Missing, p.Costs, p.Mend
		}
		out = append(out, c)
	}
	const costs = "engine uffd is taken, and a guest's first write to a page during a checkpoint waits some microseconds more"
	if f.ProofErr != nil {
		out = append(out, Check{Group: "bpf", Name: "capture in the kernel", Status: Missing, Detail: reason(f.ProofErr), Costs: costs, Mend: "run as root"})
	}
	for _, p := range f.Proofs {
		c := Check{Group: "bpf", Name: "capture in the kernel, " + p.Accel + ", " + p.RAM + " RAM", Status: OK, Detail: p.Detail}
		switch {
		case p.Late:
			c.Status, c.Detail = Limited, "the test came to no end: "+strings.Join(strings.Fields(p.Detail), " ")
			c.Costs, c.Mend = "until it does, "+costs, "ckagent doctor, when this host is less busy"
		case !p.OK:
			c.Status, c.Costs, c.Mend = Missing, costs, "the rows above; the answer holds until the next boot, or until "+
				"/run/ckagent/proving is removed"
		}
		out = append(out, c)
	}
	return out
}

const (
	slowSync  = 50 * time.Millisecond
	scarceLow = 1 << 30
)

func judgeEngines(f *Facts, r *Report) []Engine {
	usable := func(group, name string) bool {
		c := r.Find(group, name)
		return c != nil && c.Status != Missing
	}
	stopped := []string{"stop", "buffer"}
	all := append(append([]string{}, stopped...), "cow")
	inject := usable("kernel", "architecture") && usable("kernel", "userfaultfd") && usable("rights", "ptrace")

	pick := func(ram, need string) Engine {
		e := Engine{RAM: ram, Engine: "none", Modes: stopped}
		var lacks []string
		for _, n := range []string{need, "marks on absent pages", "PAGEMAP_SCAN"} {
			if !usable("kernel", n) {
				lacks = append(lacks, n)
			}
		}
		switch {
		case !inject:
			e.Reason = "a userfaultfd cannot be put into a VM here"
		case len(lacks) > 0:
			e.Reason = "this kernel has no " + strings.Join(lacks, ", no ")
		default:
			e.Engine, e.Modes, e.Reason = "uffd", all, "synchronous write protection"
		}
		return e
	}
	inKernel := func(ram string, e Engine) Engine {
		for _, p := range f.Proofs {
			if p.OK && p.RAM == ram && e.Engine == "uffd" {
				e.Engine, e.Reason = "bpf", "proved here for accelerator "+p.Accel+"; uffd for others"
			}
		}
		return e
	}
	return []Engine{
		inKernel("anonymous", pick("anonymous", "write protection, anonymous")),
		inKernel("shared", pick("memfd or tmpfs, shared", "write protection, shared")),
		pick("tmpfs, private", "write protection, shared"),
		{RAM: "file on a disk", Engine: "none", Modes: stopped, Reason: "the kernel write-protects no file mappings of disk filesystems"},
		pick("hugetlbfs, pages of 2 MiB", "write protection, shared"),
	}
}

func lacks(u *UffdFacts, want uffd.Features, err error) string {
	switch {
	case u.FeaturesErr != nil:
		return reason(u.FeaturesErr)
	case !u.Features.Has(want):
		return "this kernel lacks " + (want &^ u.Features).String()
	case err != nil:
		return reason(err)
	}
	return ""
}

// reason is an error on one line; "" would leave a check without explanation.
func reason(err error) string {
	if err == nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(err.Error()), " ")
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func versionOf(s string) (major, minor int, ok bool) {
	p := strings.SplitN(s, ".", 3)
	if len(p) < 2 {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(p[0])
	minor, err2 := strconv.Atoi(p[1])
	return major, minor, err1 == nil && err2 == nil
}

func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	div, exp := uint64(unit), 0
	for m := n / unit; m >= unit && exp < 4; m /= unit {
		div *= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", float64(n)/float64(div), "KMGTP"[exp])
}

func round(d time.Duration) time.Duration {
	if d > time.Millisecond {
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}
