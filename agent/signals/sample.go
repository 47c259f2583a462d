package signals

import (
	"time"

	"github.com/ckagent/ckagent/agent/signals/estimate"
)

// Sample is what is known of one VM at one moment. Totals count since it was
// attached; rates are over the time since the sample before.
type Sample struct {
	PID       int       `json:"pid"`
	VM        string    `json:"vm"`
	State     string    `json:"checkpoint_state"` // unprotected, attached, checkpointing, measuring, held
	Holder    int       `json:"holder_pid,omitempty"`
	Protected bool      `json:"protected"`
	Dirty     *Dirty    `json:"dirty,omitempty"`
	DirtyNote string    `json:"dirty_note,omitempty"` // why there is none, or none newer
	VCPU      *VCPU     `json:"vcpu,omitempty"`
	Network   []Network `json:"network,omitempty"`
	Disk      *Disk     `json:"disk,omitempty"`
	Notes     []string  `json:"notes,omitempty"`
}

// Dirty is the last sampled estimate.
type Dirty struct {
	AgeNS      int64            `json:"age_ns"`
	IntervalNS int64            `json:"interval_ns"`
	Rate       float64          `json:"dirty_pages_per_second"`
	Error      float64          `json:"error_pages_per_second"`
	WSSBytes   uint64           `json:"wss_bytes"` // written within wss_over_ns
	WSSOverNS  int64            `json:"wss_over_ns"`
	CurvePages float64          `json:"w_pages"`
	CurveTauNS int64            `json:"tau_ns"`
	ArmedShare float64          `json:"armed_share"`
	Windows    uint64           `json:"windows_total"`
	Shares     *estimate.Shares `json:"shares,omitempty"`
}

// VCPU is how the vCPUs spend their time.
type VCPU struct {
	Each        []VCPUTimes `json:"each"`
	RunShare    float64     `json:"run_share"`  // of all vCPUs together
	WaitShare   float64     `json:"wait_share"` // ready, but the host had no processor for them
	IdleShare   float64     `json:"idle_share"` // of the time: all vCPUs asleep
	IdleNS      int64       `json:"idle_total_ns"`
	Slots       uint64      `json:"idle_slots_total"`
	SlotsRate   float64     `json:"idle_slots_per_second"`
	LongestNS   int64       `json:"longest_idle_ns"`
	IdleSinceNS int64       `json:"idle_for_ns"` // the present slot; 0: some vCPU is awake
	HasSlots    bool        `json:"has_idle_slots"`
}

// VCPUTimes are one vCPU's.
type VCPUTimes struct {
	Index     int     `json:"index"`
	RunNS     int64   `json:"run_total_ns"`
	WaitNS    int64   `json:"wait_total_ns"`
	RunShare  float64 `json:"run_share"`
	WaitShare float64 `json:"wait_share"`
}

// Network is one device's traffic; in goes to the VM.
type Network struct {
	Device      string  `json:"device"` // the tap; "sockets" where QEMU itself is the network
	Estimate    bool    `json:"estimate"`
	InBytes     uint64  `json:"in_bytes_total"`
	OutBytes    uint64  `json:"out_bytes_total"`
	InPackets   uint64  `json:"in_packets_total"` // calls, of sockets
	OutPackets  uint64  `json:"out_packets_total"`
	InRate      float64 `json:"in_bytes_per_second"`
	OutRate     float64 `json:"out_bytes_per_second"`
	Requests    uint64  `json:"requests_total"`
	Answers     uint64  `json:"answers_total"`
	OutPktRate  float64 `json:"out_packets_per_second"` // calls, of sockets
	RequestRate float64 `json:"requests_per_second"`
	AnswerNS    int64   `json:"answer_time_total_ns"`
	Pending     int64   `json:"pending_requests"`
	Stalls      uint64  `json:"stalls_total"`
	Stalled     int64   `json:"stalled_now"`
	Slots       uint64  `json:"idle_slots_total"`
	FalseSlots  uint64  `json:"false_idle_slots_total"`
	SlotsRate   float64 `json:"idle_slots_per_second"`
	IdleNS      int64   `json:"idle_total_ns"`
	IdleShare   float64 `json:"idle_share"`
	Idle        bool    `json:"idle_now"`
}

// Disk is what was written to the VM's disks.
type Disk struct {
	Bytes    uint64  `json:"written_bytes_total"`
	Writes   uint64  `json:"writes_total"`
	Syncs    uint64  `json:"syncs_total"`
	Rate     float64 `json:"written_bytes_per_second"`
	Ops      float64 `json:"writes_per_second"`
	Estimate bool    `json:"estimate"` // some of it as asked for, or from /proc/PID/io
	Missed   uint64  `json:"missed_total"`
}

// Snapshot is what is known of all VMs.
type Snapshot struct {
	Time    time.Time `json:"time"`
	VMs     []Sample  `json:"vms"`
	Missing []Lack    `json:"missing"`
}
