package faultserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/ckagent/ckagent/agent/capture/source"
)

// Config is what the agent tells a new fault server, once, before any command.
type Config struct {
	QEMUPID      int            `json:"qemu_pid"`
	VCPUs        []int          `json:"vcpus"` // thread ids that are better not stopped for an injection
	Blocks       []source.Block `json:"blocks"`
	FaultThreads int            `json:"fault_threads"` // each owns one ring of the arena, the first ones
	ScanThreads  int            `json:"scan_threads"`  // each owns one ring, after those of the fault threads
	MaxStall     time.Duration  `json:"max_stall_ns"`  // longest a faulting thread may wait for room in the arena
	FaultAround  int            `json:"fault_around"`  // most pages captured with the one that faulted: a power of two up to 64
	HugeAround   bool           `json:"huge_around"`   // capture whole huge pages, so that they are not split
	Collapse     time.Duration  `json:"collapse_ns"`   // time to spend on making split huge pages whole again
	Engine       Engine         `json:"engine"`        // Synchronous if empty; Kernel has one fault thread, for its ring

	// For engine Kernel.
	RingBytes  int          `json:"ring_bytes"`  // of the ring in the kernel, a power of two
	Throttle   bool         `json:"throttle"`    // stop the guest by SIGSTOP, within MaxStall at a time, rather than overflow the ring
	Guest      []GuestRange `json:"guest"`       // for VMs under KVM
	Escaped    []Page       `json:"escaped"`     // copied while the guest stands still, because nobody sees who writes them
	DropRecord uint64       `json:"drop_record"` // a test: lose the so many-th record of the ring
	// Keep leaves the marks where they are at the end of a capture that succeeds, for
	// whoever took our userfaultfd (Client.Userfaultfd). Kept says that they are still
	// there from the capture before, under the userfaultfd of Start.Kept.
	Keep bool `json:"keep"`
	Kept bool `json:"kept"`
}

// GuestRange says where guest-physical memory lies in QEMU.
type GuestRange struct {
	Start uint64 `json:"start"`
	Bytes uint64 `json:"bytes"`
	Host  uint64 `json:"host"`
}

// Page is a page of a block.
type Page struct {
	Block int    `json:"block"`
	Page  uint64 `json:"page"`
}

// MaxEscaped bounds Config.Escaped: copying them is part of the pause.
const MaxEscaped = 256

const maxThreads = 16 // of each kind

func (c *Config) validate() error {
	switch {
	case c.QEMUPID <= 0:
		return fmt.Errorf("fault server: QEMU pid %d", c.QEMUPID)
	case len(c.Blocks) == 0 || len(c.Blocks) > 1024:
		return fmt.Errorf("fault server: %d blocks", len(c.Blocks))
	case c.FaultThreads < 1 || c.FaultThreads > maxThreads || c.ScanThreads < 1 || c.ScanThreads > maxThreads:
		return fmt.Errorf("fault server: %d fault threads, %d scan threads: want 1 to %d each", c.FaultThreads, c.ScanThreads, maxThreads)
	case c.FaultAround < 1 || c.FaultAround > wordPages || c.FaultAround&(c.FaultAround-1) != 0:
		return fmt.Errorf("fault server: fault-around of %d pages: want a power of two up to %d", c.FaultAround, wordPages)
	case c.MaxStall <= 0:
		return errors.New("fault server: no stall limit")
	case len(c.Escaped) > MaxEscaped:
		return fmt.Errorf("fault server: %d escaped pages: want at most %d", len(c.Escaped), MaxEscaped)
	case (c.Keep || c.Kept) && c.Engine != Kernel:
		return errors.New("fault server: only the kernel engine leaves marks that hold up nobody")
	case c.Engine == Kernel && c.FaultThreads != 1:
		return fmt.Errorf("fault server: %d fault threads: the kernel engine has one ring", c.FaultThreads)
	}
	return nil
}

// op is a command of the agent. Each is one datagram and gets one reply.
type op string

const (
	opPrearm op = "prearm" // arm everything while the guest runs
	opRearm  op = "rearm"  // arm again what was written since, guest still running
	opFreeze op = "freeze" // the guest is stopped, its device state saved
	opScan   op = "scan"   // start the background scan; the reply comes when all is released
	opAbort  op = "abort"  // let go; also what the end of the socket means
)

type request struct {
	Op op `json:"op"`
}

type reply struct {
	Failure Failure `json:"failure,omitempty"`
	Detail  string  `json:"detail,omitempty"`
	Escaped []Page  `json:"escaped,omitempty"`
	Stats   Stats   `json:"stats"`
	FD      int     `json:"fd"` // of the userfaultfd in the server, once there is one
}

// Failure classes what ended a capture early.
type Failure string

const (
	Unsupported Failure = "unsupported" // this kernel or this memory cannot be armed
	Unproven    Failure = "unproven"    // a page was found unarmed after its copy
	Stalled     Failure = "stalled"     // the store did not keep up with the guest's writes
	Aborted     Failure = "aborted"     // the agent asked, or died
	Silent      Failure = "silent"      // the server lives but does not answer
	Broken      Failure = "broken"      // a system call failed that should not
)

// Error is a capture that ended early; nothing is armed any more.
type Error struct {
	Failure Failure
	Detail  string
	// Escaped are pages that were written without our seeing by whom, if that is why
	// and they are few: another attempt can copy them while the guest stands still.
	Escaped []Page
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Failure, e.Detail) }

// FailureOf is the class of a fault server's error, or "" if err is none.
func FailureOf(err error) Failure {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Failure
	}
	return ""
}

// EscapedOf are the pages that escaped a capture in the kernel, if that is why it failed
// and they are few.
func EscapedOf(err error) []Page {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Escaped
	}
	return nil
}

// Stats is what a fault server counted up to its reply.
type Stats struct {
	ArmNS         int64  `json:"arm_ns"`          // first arm of everything, guest running
	PrearmNS      int64  `json:"prearm_ns"`       // all of prearm
	InjectNS      int64  `json:"inject_ns"`       // taking the userfaultfd from QEMU
	FreezeNS      int64  `json:"freeze_ns"`       // re-arming what was dirty, guest stopped
	FreezeRuns    int    `json:"freeze_runs"`     // runs of pages re-armed in it
	PrearmPasses  int    `json:"prearm_passes"`   // passes over the dirty pages before it
	TrackedFaults uint64 `json:"tracked_faults"`  // faults let through while tracking
	Faults        uint64 `json:"faults"`          // faults of the guest while capturing
	FaultPages    uint64 `json:"fault_pages"`     // pages captured because of one, neighbours included
	ScanPages     uint64 `json:"scan_pages"`      // pages captured by the scan
	FaultP50NS    int64  `json:"fault_p50_ns"`    // from reading a fault to releasing it
	FaultP99NS    int64  `json:"fault_p99_ns"`    // the same
	FaultMaxNS    int64  `json:"fault_max_ns"`    // the same
	ScanNS        int64  `json:"scan_ns"`         // freeze to everything captured
	ReleaseNS     int64  `json:"release_ns"`      // unregistering
	HugeBefore    int    `json:"huge_before"`     // huge pages when armed
	HugeSplit     int    `json:"huge_split"`      // of them, split at the end
	HugeCollapsed int    `json:"huge_collapsed"`  // of them, made whole again
	RingPeakBytes uint64 `json:"ring_peak_bytes"` // engine bpf: most that waited in the kernel's ring
	Stops         uint64 `json:"stops"`           // engine bpf: times the guest was stopped because the ring was filling up
	StopMaxNS     int64  `json:"stop_max_ns"`     // engine bpf: longest of them
	EscapedPages  int    `json:"escaped_pages"`   // engine bpf: pages copied in the pause because they escaped before
	SamePages     uint64 `json:"same_pages"`      // engine bpf: pages not written since the capture before, by its marks
}

func decodeRequest(b []byte) (op, error) {
	var r request
	if err := json.Unmarshal(b, &r); err != nil {
		return "", fmt.Errorf("fault server: request: %w", err)
	}
	switch r.Op {
	case opPrearm, opRearm, opFreeze, opScan, opAbort:
		return r.Op, nil
	}
	return "", fmt.Errorf("fault server: unknown request %q", r.Op)
}
