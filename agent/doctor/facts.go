package doctor

import (
	"time"

	"github.com/ckagent/ckagent/bpf/probe"
	"github.com/ckagent/ckagent/uffd"
)

// Facts is everything Judge looks at. A nil error means that it worked.
type Facts struct {
	Kernel string // release, as uname says
	Arch   string // as Go calls it

	Uffd      UffdFacts
	Scan      bool  // PAGEMAP_SCAN answers
	Collapse  error // MADV_COLLAPSE of memory of our own
	HugePages HugePageFacts
	KSM       int // /sys/kernel/mm/ksm/run; -1 if there is none
	BPF       []probe.Result
	Proofs    []Proof
	ProofErr  error
	KVM       KVMFacts
	Cgroup    CgroupFacts
	Rights    RightsFacts
	QEMU      []QEMUFacts
	Tools     []ToolFacts
	Store     StoreFacts
}

// Proof is the test of the capture in the kernel (engine bpf) for one accelerator and
// one kind of RAM.
type Proof struct {
	Accel, RAM string // tcg; anonymous, shared
	OK         bool
	Late       bool // nothing is known: the host had not the time for it
	Detail     string
}

// UffdFacts says how a userfaultfd can be had and what it can do.
type UffdFacts struct {
	DeviceErr    error // making one through /dev/userfaultfd
	SyscallErr   error // userfaultfd(2), for kernel-mode faults too
	Unprivileged int   // sysctl vm.unprivileged_userfaultfd; -1 if there is none
	Features     uffd.Features
	FeaturesErr  error
	// Registering memory of our own for synchronous write protection.
	WPAnonErr, WPSharedErr error
	// Registering memory of our own for missing faults.
	MissingAnonErr, MissingSharedErr error
}

// HugePageFacts is the state of huge pages.
type HugePageFacts struct {
	Transparent        string // always, madvise, never; "" if there are none
	HugetlbTotal, Free uint64 // 2 MiB pages in the pool
}

// KVMFacts says what /dev/kvm is worth.
type KVMFacts struct {
	OpenErr   error // opening /dev/kvm
	CreateErr error // KVM_CREATE_VM and a vCPU
	RealErr   error // running 16-bit code
	LongErr   error // running 64-bit code
	Hardware  bool  // the CPU shows VMX or SVM
	Nested    bool  // this host is a virtual machine itself
}

// CgroupFacts says which control groups are there.
type CgroupFacts struct {
	V2         string   // mount point of the unified hierarchy, "" if none
	V2Write    error    // whether a group could be made below our own there
	V2Freeze   bool     // cgroup.freeze exists for non-root groups
	V1         []string // mounted v1 controllers
	FreezerDir string   // mount point of the v1 freezer, "" if none
	V1Write    error
}

// RightsFacts says what this process may do.
type RightsFacts struct {
	EUID         int
	Caps         uint64 // effective set
	MemlockBytes uint64 // soft limit; ^0: unlimited
	PtraceScope  int    // Yama; -1 if there is none
	NoNewPrivs   bool
}

// QEMUFacts is a QEMU binary found.
type QEMUFacts struct {
	Path    string
	Version string // "7.2.22", "" if it did not say
	Err     error
}

// ToolFacts is an external program some verbs use.
type ToolFacts struct {
	Name, Path string // Path "" if not found
	Use        string // what it is for
}

// StoreFacts is the state of the checkpoint store.
type StoreFacts struct {
	Path       string
	Exists     bool
	IsDir      bool
	Mode       uint32 // permission bits
	Probed     string // the nearest existing directory, where the rest was measured
	Hung       bool   // it did not answer in time
	WriteErr   error
	FSType     string
	Network    bool // a network or FUSE filesystem
	Volatile   bool // lost at the next boot
	FreeBytes  uint64
	TotalBytes uint64
	SyncMedian time.Duration // write of 4 KiB + fsync
	SyncMax    time.Duration
}
