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
}

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
	Stats   Stats   `json:"stats"`
}

// Failure classes what ended a capture early.
type Failure string

const (
	Unsupported Failure = "unsupported" // this kernel or this memory cannot be armed
	Unproven    Failure = "unproven"    // a page was found unarmed after its copy
	Stalled     Failure = "stalled"     // the store did not keep up with the guest's writes
	Aborted     Failure = "aborted"     // the agent asked, or died
	Broken      Failure = "broken"      // a system call failed that should not
)

// Error is a capture that ended early; nothing is armed any more.
type Error struct {
	Failure Failure
	Detail  string
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Failure, e.Detail) }

// FailureOf is the class of a fault server's error, or "" if err is none.
func FailureOf(err error) Failure {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Failure
	}
	return ""
}

// Stats is what a fault server counted up to its reply.
type Stats struct {
	ArmNS         int64  `json:"arm_ns"`         // first arm of everything, guest running
	PrearmNS      int64  `json:"prearm_ns"`      // all of prearm
	InjectNS      int64  `json:"inject_ns"`      // taking the userfaultfd from QEMU
	FreezeNS      int64  `json:"freeze_ns"`      // re-arming what was dirty, guest stopped
	FreezeRuns    int    `json:"freeze_runs"`    // runs of pages re-armed in it
	PrearmPasses  int    `json:"prearm_passes"`  // passes over the dirty pages before it
	TrackedFaults uint64 `json:"tracked_faults"` // faults let through while tracking
	Faults        uint64 `json:"faults"`         // faults of the guest while capturing
	FaultPages    uint64 `json:"fault_pages"`    // pages captured because of one, neighbours included
	ScanPages     uint64 `json:"scan_pages"`     // pages captured by the scan
	FaultP50NS    int64  `json:"fault_p50_ns"`   // from reading a fault to releasing it
	FaultP99NS    int64  `json:"fault_p99_ns"`   // the same
	FaultMaxNS    int64  `json:"fault_max_ns"`   // the same
	ScanNS        int64  `json:"scan_ns"`        // freeze to everything captured
	ReleaseNS     int64  `json:"release_ns"`     // unregistering
	HugeBefore    int    `json:"huge_before"`    // huge pages when armed
	HugeSplit     int    `json:"huge_split"`     // of them, split at the end
	HugeCollapsed int    `json:"huge_collapsed"` // of them, made whole again
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
