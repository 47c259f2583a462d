package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
)

// captureFlags are the flags of every verb that takes checkpoints.
type captureFlags struct {
	store      string
	name, qmp  string
	mode       string
	engine     string
	compress   string
	direct     bool
	parent     string
	fullEvery  int
	dedup      bool
	tenant     string
	keepLast   int
	minFree    sizeValue
	maxStall   time.Duration
	captureMem sizeValue
	bufferMem  sizeValue
	disks      string
	diskSpeed  sizeValue
	diskMem    sizeValue
	overlayDir string

	preHook, postHook string
	hookTimeout       time.Duration
	freeze            bool
	freezeTimeout     time.Duration
}

func (f *captureFlags) add(c *cobra.Command) {
	storeFlag(c, &f.store)
	fl := c.Flags()
	fl.StringVar(&f.name, "name", "", "name of the VM in the store (default: QEMU's -name)")
	fl.StringVar(&f.qmp, "qmp", "", "address of the QMP monitor (default: found from the process)")
	fl.StringVar(&f.mode, "mode", "auto", "auto, stop, buffer or cow")
	fl.StringVar(&f.engine, "engine", "auto", "capture engine of mode cow: auto, uffd or bpf (the kernel copies pages before they are written)")
	fl.StringVar(&f.compress, "compress", "none", "none, s2 or zstd")
	fl.BoolVar(&f.direct, "direct", false, "write past the host's page cache")
	fl.StringVar(&f.parent, "parent", capture.ParentAuto, "checkpoint to continue, of whose pages only changed ones are stored: auto (the VM's newest), none or an id")
	fl.IntVar(&f.fullEvery, "full-every", capture.DefaultFullEvery, "most checkpoints in a chain: attach merges the newest before, and a full one is taken where that was not done (1: full ones only)")
	fl.BoolVar(&f.dedup, "dedup", false, "store content once that the guest has more than once, or that it has moved")
	fl.StringVar(&f.tenant, "tenant", "", "with --dedup also what other VMs of this tenant have; VMs of different tenants share nothing")
	fl.IntVar(&f.keepLast, "keep-last", 4, "delete the VM's checkpoints beyond this many (0: keep all)")
	fl.Var(&f.minFree, "min-free", "space to leave free in the store")
	fl.DurationVar(&f.maxStall, "max-stall", 100*time.Millisecond, "longest time a vCPU may wait for us")
	fl.Var(&f.captureMem, "capture-memory", "memory for pages on their way to the store in mode cow (default 96M)")
	fl.StringVar(&f.disks, "disks", "backup", "backup (copy the writable disks of the same instant to the store), overlay (the same, with the guest's writes in overlays meanwhile), snapshot (keep them inside their qcow2 images) or none")
	fl.StringVar(&f.overlayDir, "overlay-dir", "", "directory for the files of --disks overlay (default: beside each image)")
	fl.Var(&f.diskSpeed, "disk-speed", "most to copy of each disk per second (default 256M)")
	fl.Var(&f.diskMem, "disk-memory", "memory for what the guest overwrites before it was copied (default: a quarter of what is available, at most 1G)")
	fl.Var(&f.bufferMem, "buffer-memory", "limit of mode buffer (default: half of the available memory)")
	fl.StringVar(&f.preHook, "pre-hook", "", "shell command to run before; if it fails, no checkpoint is taken")
	fl.StringVar(&f.postHook, "post-hook", "", "shell command to run after, whatever happened")
	fl.DurationVar(&f.hookTimeout, "hook-timeout", time.Minute, "longest time a hook may take")
	fl.BoolVar(&f.freeze, "freeze", false, "have qemu-ga freeze the guest's file systems for the pause")
	fl.DurationVar(&f.freezeTimeout, "freeze-timeout", 10*time.Second, "longest time they may be frozen")
}

// spec is what the flags say, of which what was not given is the default's.
func (f *captureFlags) spec(c *cobra.Command) *apipb.Spec {
	given := c.Flags().Changed
	s := &apipb.Spec{Direct: f.direct, Parent: f.parent, FullEvery: proto.Int32(int32(f.fullEvery)), Dedup: f.dedup, Tenant: f.tenant,
		Name: f.name, Qmp: absoluteMonitor(f.qmp), Mode: f.mode, Engine: f.engine, MaxStallNs: int64(f.maxStall),
		MinFreeBytes: uint64(f.minFree), ArenaBytes: uint64(f.captureMem), BufferBytes: uint64(f.bufferMem),
		Disks: f.disks, DiskSpeedBytes: uint64(f.diskSpeed), DiskMemoryBytes: uint64(f.diskMem),
		PreHook: f.preHook, PostHook: f.postHook, HookTimeoutNs: int64(f.hookTimeout)}
	if given("store") {
		s.Store = absolute(f.store)
	}
	if f.overlayDir != "" {
		s.OverlayDir = absolute(f.overlayDir)
	}
	if given("compress") {
		s.Compress = f.compress
	}
	if given("keep-last") {
		s.KeepLast = proto.Int32(int32(f.keepLast))
	}
	if f.freeze {
		s.FreezeNs = int64(f.freezeTimeout)
	}
	return s
}

// absolute is a path that means the same to a process that is elsewhere.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// absoluteMonitor is absolute for the address of a monitor: a guardian, which has to find
// it when we are dead, is elsewhere. What is no address stays, to be refused as it is.
func absoluteMonitor(address string) string {
	e, err := qmp.ParseEndpoint(address)
	if err != nil || e.Network != "unix" || strings.HasPrefix(e.Address, "@") || filepath.IsAbs(e.Address) {
		return address
	}
	return "unix:" + absolute(e.Address)
}

// plan is what the flags ask of this process itself.
func (a *app) plan(s *apipb.Spec) (agent.Options, agent.Protection, error) {
	o, p, err := agent.Planned(s)
	p.Capture.Progress = func(e capture.Event) { a.log.Debug(e.Step, "detail", e.Detail, "took", e.Took) }
	return o, p, err
}

func newCheckpointCommand(a *app) *cobra.Command {
	var f captureFlags
	c := &cobra.Command{
		Use: "checkpoint VM|QEMU-PID", Short: "Take one checkpoint of a running VM", Args: exactArgs(1, "a protected VM or the pid of a QEMU process"),
		Long: "Take one checkpoint of a running VM. Of a VM that a daemon or an attach protects it is taken by that, in\n" +
			"the way the VM is protected; any other is named by its pid.",
		RunE: func(c *cobra.Command, args []string) error { return runCheckpoint(c, a, &f, args[0]) },
	}
	f.add(c)
	return c
}

func parsePID(s string) (int, error) {
	pid, err := strconv.Atoi(s)
	if err != nil || pid <= 0 {
		return 0, usageError("%q is no pid; VMs by name need the daemon", s)
	}
	return pid, nil
}

func runCheckpoint(c *cobra.Command, a *app, f *captureFlags, ref string) error {
	pid, err := strconv.Atoi(ref)
	if err == nil {
		if pid <= 0 {
			return usageError("%q is no pid", ref)
		}
		// Most VMs that are named by pid nobody protects: then nobody is asked.
		if err = a.takeCheckpoint(c, f, pid); !problem.Is(err, problem.Busy) {
			return err
		}
	}
	vm, unknown := a.findProtected(c.Context(), ref)
	switch {
	case unknown == nil:
		return errors.Join(a.orderCheckpoint(c, vm), vm.conn.Close())
	case problem.Is(err, problem.Busy):
		return err // whoever works on it does not protect it
	}
	return unknown
}

// orderCheckpoint has whoever protects a VM take one.
func (a *app) orderCheckpoint(c *cobra.Command, vm *protected) error {
	for _, name := range []string{"mode", "engine", "compress", "store", "name", "disks"} {
		if c.Flags().Changed(name) {
			return usageError("--%s: VM %s is protected, and its checkpoints are taken as it was attached to; detach it first", name, vm.status.GetVm())
		}
	}
	stream, err := vm.Checkpoint(c.Context(), &apipb.CheckpointRequest{Vm: vm.status.GetVm()})
	if err != nil {
		return api.FromStatus("checkpoint", err)
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return api.FromStatus("checkpoint", err)
		}
		if t := e.GetTaken(); t != nil {
			res, err := resultOf(t)
			if err != nil {
				return err
			}
			a.printCheckpoint(res)
			return nil
		}
		a.log.Debug(e.GetStep(), "detail", e.GetDetail())
	}
}

// resultOf is what another process of ours says of a checkpoint that it took.
func resultOf(t *apipb.Checkpoint) (*capture.Result, error) {
	var res capture.Result
	err := json.Unmarshal(t.GetResult(), &res)
	if err == nil && (res.Manifest == nil || len(res.Manifest.Blocks) == 0) {
		err = errors.New("nothing is said of it")
	}
	if err != nil {
		return nil, problem.New(problem.Failed, "checkpoint", "VM "+t.GetVm(), "%s was taken, by a ckagent of another version: %w", t.GetId(), err).
			WithHint("ckagent inspect %s; and start the daemon, or attach, anew", t.GetId())
	}
	return &res, nil
}

func (a *app) takeCheckpoint(c *cobra.Command, f *captureFlags, pid int) (err error) {
	ao, p, err := a.plan(f.spec(c))
	if err != nil {
		return err
	}
	ctx := c.Context()
	st, err := store.Open(f.store)
	if err != nil {
		return err
	}
	v, err := agent.Attach(ctx, pid, ao)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	res, err := v.Checkpoint(ctx, st, p.Capture)
	if err != nil {
		return err
	}
	if p.KeepLast > 0 {
		// The checkpoint exists: that older ones could not be dropped is no reason
		// to take it again.
		if err := agent.Retain(ctx, st, v.Name, p.KeepLast); err != nil {
			a.log.Warn("older checkpoints are still there", "vm", v.Name, "error", err)
		}
	}
	a.printCheckpoint(res)
	return nil
}

// checkpointResult is what a new checkpoint is reported as.
type checkpointResult struct {
	Schema        string     `json:"schema"`
	ID            string     `json:"id"`
	VM            string     `json:"vm"`
	QEMUPID       int        `json:"qemu_pid"`
	Mode          string     `json:"mode"`
	Engine        string     `json:"engine"`
	Parent        string     `json:"parent"`
	Depth         int        `json:"depth"` // of the chain; 0: a full one
	RAMBytes      uint64     `json:"ram_bytes"`
	PageBytes     uint64     `json:"page_bytes"`
	Pages         uint64     `json:"pages"`
	ZeroPages     uint64     `json:"zero_pages"`
	CapturedPages uint64     `json:"captured_pages"`
	StoredBytes   uint64     `json:"stored_bytes"`
	Unchanged     uint64     `json:"unchanged_pages"` // since the parent, zero pages left out
	Shared        uint64     `json:"shared_pages"`    // found elsewhere
	PauseNS       int64      `json:"pause_ns"`
	ArmNS         int64      `json:"arm_ns"`
	DeviceStateNS int64      `json:"device_state_ns"`
	TotalNS       int64      `json:"total_ns"`
	StopNS        int64      `json:"stop_ns"`
	ContNS        int64      `json:"cont_ns"`
	PrearmNS      int64      `json:"prearm_ns"`
	ScanNS        int64      `json:"scan_ns"`
	ReleaseNS     int64      `json:"release_ns"`
	Faults        uint64     `json:"faults"`
	FaultP50NS    int64      `json:"fault_p50_ns"`
	FaultP99NS    int64      `json:"fault_p99_ns"`
	FaultMaxNS    int64      `json:"fault_max_ns"`
	RearmedRuns   int        `json:"rearmed_runs"`
	TrackedFaults uint64     `json:"tracked_faults"`
	HugeBefore    int        `json:"huge_pages_before"`
	HugeSplit     int        `json:"huge_pages_split"`
	HugeCollapsed int        `json:"huge_pages_collapsed"`
	RingPeakBytes uint64     `json:"ring_peak_bytes"`
	Stops         uint64     `json:"stops"`
	StopMaxNS     int64      `json:"stop_max_ns"`
	EscapedPages  int        `json:"escaped_pages"`
	SamePages     uint64     `json:"same_pages"`
	Reason        string     `json:"reason"`  // why not mode cow, if mode auto had to do without
	Retaken       []string   `json:"retaken"` // why earlier attempts were discarded
	Disks         []diskView `json:"disks"`
	DiskBytes     uint64     `json:"disk_bytes"` // written to volumes
	DisksNS       int64      `json:"disks_ns"`   // of the pause
	Notes         []string   `json:"notes"`      // what went wrong beside it
}

func (a *app) printCheckpoint(res *capture.Result) {
	m, st := res.Manifest, res.Capture
	r := checkpointResult{
		Schema: schema("checkpoint"), ID: m.ID, VM: m.VM, QEMUPID: res.PID, Mode: m.Mode, Engine: m.Engine, Parent: m.Parent, Depth: m.Depth,
		Unchanged: res.Image.UnchangedPages, Shared: res.Image.SharedPages,
		RAMBytes: m.Stats.RAMBytes, PageBytes: m.Blocks[0].PageBytes, Pages: m.Stats.Pages, ZeroPages: m.Stats.ZeroPages,
		CapturedPages: m.Stats.CapturedPages, StoredBytes: m.Stats.StoredBytes,
		PauseNS: m.Stats.PauseNS, ArmNS: m.Stats.ArmNS, DeviceStateNS: m.Stats.DeviceStateNS, TotalNS: m.Stats.TotalNS,
		StopNS: res.Timing.StopNS, ContNS: res.Timing.ContNS, PrearmNS: st.PrearmNS, ScanNS: st.ScanNS, ReleaseNS: st.ReleaseNS,
		Faults: st.Faults, FaultP50NS: st.FaultP50NS, FaultP99NS: st.FaultP99NS, FaultMaxNS: st.FaultMaxNS,
		RearmedRuns: st.FreezeRuns, TrackedFaults: st.TrackedFaults,
		HugeBefore: st.HugeBefore, HugeSplit: st.HugeSplit, HugeCollapsed: st.HugeCollapsed,
		RingPeakBytes: st.RingPeakBytes, Stops: st.Stops, StopMaxNS: st.StopMaxNS, EscapedPages: st.EscapedPages, SamePages: st.SamePages,
		Reason: res.Reason, Retaken: res.Retaken, Notes: res.Notes,
	}
	if r.Notes == nil {
		r.Notes = []string{}
	}
	r.Disks, r.DiskBytes, r.DisksNS = diskViews(m), m.Stats.DiskBytes, res.Timing.DisksNS
	if r.Retaken == nil {
		r.Retaken = []string{}
	}
	if a.json {
		a.print("checkpoint", r)
		return
	}
	fmt.Fprintf(a.out, "%s of VM %s: mode %s, engine %s, pause %s (device state %s), total %s, %s RAM, %s stored, %d pages by %d faults\n",
		r.ID, r.VM, r.Mode, r.Engine, durationText(time.Duration(r.PauseNS)), durationText(time.Duration(r.DeviceStateNS)),
		durationText(time.Duration(r.TotalNS)), sizeText(r.RAMBytes), sizeText(r.StoredBytes), r.CapturedPages, r.Faults)
	if r.Parent != "" {
		fmt.Fprintf(a.out, "continues %s: %d pages unchanged\n", r.Parent, r.Unchanged)
	}
	printDisks(a, r.Disks)
	for _, why := range r.Retaken {
		fmt.Fprintf(a.out, "an attempt was discarded: %s\n", why)
	}
	if r.Reason != "" {
		fmt.Fprintf(a.out, "mode %s and not cow: %s\n", r.Mode, r.Reason)
	}
	for _, n := range r.Notes {
		a.log.Warn(n)
	}
}
