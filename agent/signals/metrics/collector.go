package metrics

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/store"
)

// Source is where figures come from.
type Source struct {
	Snapshot func() signals.Snapshot
	Store    *store.Store  // nil: no series about checkpoints
	Goal     time.Duration // time between checkpoints that is aimed at
}

// Collector makes series of a Source.
type Collector struct {
	src Source

	mu    sync.Mutex // guards what is remembered of the store
	asked time.Time
	list  []store.Info
	free  uint64
	total uint64
	err   error
}

// New makes a collector.
func New(src Source) *Collector { return &Collector{src: src} }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("ckagent_"+name, help, labels, nil)
}

var (
	vmLabels = []string{"vm", "pid"}
	device   = []string{"vm", "pid", "device"}

	vmState   = desc("vm_protected", "1 if ckagent is attached to the VM or checkpoints it now.", vmLabels...)
	dirtyRate = desc("vm_dirty_pages_per_second", "Distinct 4 KiB pages written per second, by sampling.", vmLabels...)
	dirtyErr  = desc("vm_dirty_error_pages_per_second", "Half-width of the 95 % confidence interval of the dirty rate.", vmLabels...)
	dirtyAge  = desc("vm_dirty_sample_age_seconds", "Age of the dirty-rate sample.", vmLabels...)
	dirtyWSS  = desc("vm_write_working_set_bytes", "Memory written in the longest window observed.", vmLabels...)
	dirtyTau  = desc("vm_dirty_tau_seconds", "Time constant of the dirty-rate curve.", vmLabels...)
	dirtyWin  = desc("vm_dirty_windows_total", "Dirty-rate windows measured.", vmLabels...)
	armed     = desc("vm_dirty_armed_ratio", "Share of memory armed in the last window.", vmLabels...)
	makeup    = desc("vm_dirty_makeup_ratio", "Share of the written pages that are of a kind.", "vm", "pid", "kind")

	cpuRun  = desc("vm_vcpu_run_seconds_total", "Time a vCPU ran.", "vm", "pid", "vcpu")
	cpuWait = desc("vm_vcpu_wait_seconds_total", "Time a vCPU was ready and the host had no processor for it.", "vm", "pid", "vcpu")
	cpuIdle = desc("vm_vcpu_idle_seconds_total", "Time in which all vCPUs slept.", vmLabels...)
	cpuSlot = desc("vm_vcpu_idle_slots_total", "Idle slots: times at which all vCPUs began to sleep.", vmLabels...)

	netBytes   = desc("vm_network_bytes_total", "Bytes to (in) and from (out) the VM.", "vm", "pid", "device", "direction")
	netPackets = desc("vm_network_packets_total", "Packets to (in) and from (out) the VM; calls, for the device sockets.", "vm", "pid", "device", "direction")
	netReq     = desc("vm_network_requests_total", "TCP requests to the VM.", device...)
	netAns     = desc("vm_network_answers_total", "TCP requests that were answered.", device...)
	netAnsTime = desc("vm_network_answer_seconds_total", "Time requests waited for their answers.", device...)
	netPending = desc("vm_network_pending_requests", "TCP requests waiting for an answer.", device...)
	netStalls  = desc("vm_network_stalls_total", "TCP receive windows that closed.", device...)
	netSlots   = desc("vm_network_idle_slots_total", "Idle slots: times without a packet for the gap.", device...)
	netFalse   = desc("vm_network_false_idle_slots_total", "Idle slots that ended right after they were found.", device...)
	netIdle    = desc("vm_network_idle_seconds_total", "Time in idle slots.", device...)

	diskBytes  = desc("vm_disk_written_bytes_total", "Bytes written to the VM's disks.", vmLabels...)
	diskWrites = desc("vm_disk_writes_total", "Write operations on the VM's disks.", vmLabels...)
	diskSyncs  = desc("vm_disk_syncs_total", "Flushes of the VM's disks.", vmLabels...)

	missing = desc("signal_missing", "1 for each signal that this host does not give.", "program")

	success   = desc("checkpoint_last_success_timestamp_seconds", "When the VM's newest checkpoint was taken.", "vm")
	goal      = desc("checkpoint_goal_seconds", "Time between checkpoints that is aimed at.")
	kept      = desc("checkpoints", "Checkpoints in the store.", "vm")
	stored    = desc("checkpoint_stored_bytes", "Size of the VM's checkpoints in the store.", "vm")
	pause     = desc("checkpoint_last_pause_seconds", "Pause of the VM's newest checkpoint.", "vm")
	discarded = desc("checkpoint_last_discarded_attempts", "Attempts that were discarded before the VM's newest checkpoint succeeded, by the engine it was taken with.", "vm", "engine")
	storeFree = desc("store_free_bytes", "Space left in the store's file system.")
	storeSize = desc("store_size_bytes", "Size of the store's file system.")
	storeUp   = desc("store_up", "1 if the store could be read.")
)

// Describe sends nothing: which series there are depends on the VMs.
func (c *Collector) Describe(chan<- *prometheus.Desc) {}

// Collect makes the series.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	sendAs := func(kind prometheus.ValueType) send {
		return func(d *prometheus.Desc, v float64, labels ...string) {
			text := make([]string, len(labels))
			for i, l := range labels { // interfaces and strangers' QEMUs may be called by any bytes
				text[i] = strings.ToValidUTF8(l, "?")
			}
			out <- prometheus.MustNewConstMetric(d, kind, v, text...)
		}
	}
	gauge, total := sendAs(prometheus.GaugeValue), sendAs(prometheus.CounterValue)
	s := c.src.Snapshot()
	for _, l := range s.Missing {
		gauge(missing, 1, l.Program)
	}
	for i := range s.VMs {
		collectVM(&s.VMs[i], gauge, total)
	}
	if c.src.Store != nil {
		c.collectStore(gauge)
	}
}

type send func(d *prometheus.Desc, v float64, labels ...string)

const second = 1e9 // in ns

func collectVM(x *signals.Sample, gauge, total send) {
	pid := strconv.Itoa(x.PID)
	name := x.VM
	if name == "" {
		name = pid
	}
	protected := 0.0
	if x.Protected {
		protected = 1
	}
	gauge(vmState, protected, name, pid)
	if d := x.Dirty; d != nil {
		gauge(dirtyRate, d.Rate, name, pid)
		gauge(dirtyErr, d.Error, name, pid)
		gauge(dirtyAge, float64(d.AgeNS)/second, name, pid)
		gauge(dirtyWSS, float64(d.WSSBytes), name, pid)
		gauge(dirtyTau, float64(d.CurveTauNS)/second, name, pid)
		total(dirtyWin, float64(d.Windows), name, pid)
		gauge(armed, d.ArmedShare, name, pid)
		if s := d.Shares; s != nil {
			for kind, v := range map[string]float64{"zero": s.Zero, "false_dirty": s.FalseDirty, "duplicate": s.Duplicate, "compressible": s.Compressible} {
				gauge(makeup, v, name, pid, kind)
			}
		}
	}
	if v := x.VCPU; v != nil {
		for _, t := range v.Each {
			total(cpuRun, float64(t.RunNS)/second, name, pid, strconv.Itoa(t.Index))
			total(cpuWait, float64(t.WaitNS)/second, name, pid, strconv.Itoa(t.Index))
		}
		if v.HasSlots {
			total(cpuIdle, float64(v.IdleNS)/second, name, pid)
			total(cpuSlot, float64(v.Slots), name, pid)
		}
	}
	for _, n := range x.Network {
		l := []string{name, pid, n.Device}
		total(netBytes, float64(n.InBytes), name, pid, n.Device, "in")
		total(netBytes, float64(n.OutBytes), name, pid, n.Device, "out")
		total(netPackets, float64(n.InPackets), name, pid, n.Device, "in")
		total(netPackets, float64(n.OutPackets), name, pid, n.Device, "out")
		total(netSlots, float64(n.Slots), l...)
		total(netIdle, float64(n.IdleNS)/second, l...)
		if n.Estimate {
			continue // sockets know neither requests nor windows
		}
		total(netReq, float64(n.Requests), l...)
		total(netAns, float64(n.Answers), l...)
		total(netAnsTime, float64(n.AnswerNS)/second, l...)
		gauge(netPending, float64(n.Pending), l...)
		total(netStalls, float64(n.Stalls), l...)
		total(netFalse, float64(n.FalseSlots), l...)
	}
	if d := x.Disk; d != nil {
		total(diskBytes, float64(d.Bytes), name, pid)
		total(diskWrites, float64(d.Writes), name, pid)
		total(diskSyncs, float64(d.Syncs), name, pid)
	}
}

const (
	storeAge     = 10 * time.Second // how old what is known of the store may be
	storeTimeout = 2 * time.Second
)

func (c *Collector) collectStore(gauge send) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.asked) > storeAge {
		c.lookAtStore()
	}
	gauge(goal, c.src.Goal.Seconds())
	if c.err != nil {
		gauge(storeUp, 0)
		return
	}
	gauge(storeUp, 1)
	gauge(storeFree, float64(c.free))
	gauge(storeSize, float64(c.total))
	type sums struct {
		n, bytes float64
		newest   store.Info
	}
	by := map[string]*sums{}
	for _, i := range c.list {
		s := by[i.VM]
		if s == nil {
			s = &sums{}
			by[i.VM] = s
		}
		s.n, s.bytes = s.n+1, s.bytes+float64(i.StoredBytes)
		if i.Damage == nil && i.CreatedAt.After(s.newest.CreatedAt) {
			s.newest = i
		}
	}
	for vm, s := range by {
		gauge(kept, s.n, vm)
		gauge(stored, s.bytes, vm)
		if !s.newest.CreatedAt.IsZero() {
			gauge(success, float64(s.newest.CreatedAt.UnixNano())/second, vm)
			gauge(pause, float64(s.newest.PauseNS)/second, vm)
			gauge(discarded, float64(s.newest.Discarded), vm, s.newest.Engine)
		}
	}
}

func (c *Collector) lookAtStore() {
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	c.asked = time.Now()
	if c.list, c.err = c.src.Store.List(ctx); c.err != nil {
		return
	}
	if c.free, c.err = c.src.Store.FreeBytes(); c.err == nil {
		c.total, c.err = sizeOf(c.src.Store.Dir())
	}
}
