package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/signals/estimate"
	"github.com/ckagent/ckagent/agent/signals/heatmap"
	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/bpf/dirty"
)

type dirtyRateOptions struct {
	duration, interval time.Duration
	method             string
	precision, share   float64
	heatmap            bool
	png, qmp           string
	locked             bool
}

func newDirtyRateCommand(a *app) *cobra.Command {
	var o dirtyRateOptions
	c := &cobra.Command{
		Use: "dirty-rate QEMU-PID", Short: "Measure how fast a running VM writes its memory, and where",
		Long: "Measure how fast a running VM writes its memory, and where.\n\n" +
			"exact arms all of memory and reads what was written once per interval; sampled arms a\n" +
			"random part of it and reports how wrong that may be (95 %). The rate is of distinct pages\n" +
			"per interval: a page written twice in one counts once, so the rate falls with the interval.",
		Args: exactArgs(1, "the pid of a QEMU process"),
		RunE: func(c *cobra.Command, args []string) error { return runDirtyRate(c, a, &o, args[0]) },
	}
	f := c.Flags()
	f.DurationVar(&o.duration, "for", 10*time.Second, "how long to measure")
	f.DurationVar(&o.interval, "interval", time.Second, "time within which a page counts once")
	f.StringVar(&o.method, "method", "exact", "exact or sampled")
	f.Float64Var(&o.precision, "precision", 0.12, "sampled: half-width of the error bar wanted, relative to the rate")
	f.Float64Var(&o.share, "max-share", 0.5, "sampled: share of memory armed at most")
	f.BoolVar(&o.heatmap, "heatmap", false, "show where memory is written")
	f.StringVar(&o.png, "png", "", "write the heat map to a file as a picture")
	f.StringVar(&o.qmp, "qmp", "", "address of the QMP monitor (default: found from the process)")
	f.BoolVar(&o.locked, "locked", false, "descriptor 3 is the VM's lock, which is held; end with standard input")
	_ = f.MarkHidden("locked") // the flag exists; it is the daemon's
	return c
}

func (o *dirtyRateOptions) check() error {
	switch {
	case o.method != "exact" && o.method != "sampled":
		return usageError("--method %q: want exact or sampled", o.method)
	case o.interval < 10*time.Millisecond || o.interval > time.Hour:
		return usageError("--interval %v: want 10ms to 1h", o.interval)
	case o.duration < o.interval || o.duration > 24*time.Hour:
		return usageError("--for %v: want the interval (%v) to 24h", o.duration, o.interval)
	case o.precision < 0.005 || o.precision > 1:
		return usageError("--precision %v: want 0.005 to 1", o.precision)
	case o.share <= 0 || o.share > 1:
		return usageError("--max-share %v: want above 0 to 1", o.share)
	}
	return nil
}

// dirtyRateResult is what a measurement is reported as.
type dirtyRateResult struct {
	Schema        string           `json:"schema"`
	PID           int              `json:"pid"`
	VM            string           `json:"vm"`
	Method        string           `json:"method"`
	IntervalNS    int64            `json:"interval_ns"`
	TimeNS        int64            `json:"time_ns"`
	Intervals     int              `json:"intervals"`
	Rate          float64          `json:"dirty_pages_per_second"`
	Error         float64          `json:"error_pages_per_second"`
	Spread        float64          `json:"stddev_pages_per_second"`
	Peak          float64          `json:"peak_pages_per_second"`
	WSSBytes      uint64           `json:"wss_bytes"`
	WSSErrorBytes uint64           `json:"wss_error_bytes"`
	PageBytes     uint64           `json:"page_bytes"`
	RAMBytes      uint64           `json:"ram_bytes"`
	ArmedShare    float64          `json:"armed_share"`
	BusyNS        int64            `json:"busy_ns"`
	Live          *liveResult      `json:"live"`
	Curve         *curveResult     `json:"curve"`
	Shares        *sharesResult    `json:"shares,omitempty"`
	Blocks        []blockRate      `json:"blocks"`
	Untracked     []untrackedBlock `json:"untracked,omitempty"`
	Heat          []blockHeat      `json:"heatmap,omitempty"`
	Notes         []string         `json:"notes,omitempty"`
}

// liveResult is what the fault program counted in the same time.
type liveResult struct {
	Program string `json:"program"`
	Pages   uint64 `json:"pages"`
}

type curveResult struct {
	Pages     float64      `json:"w_pages"`
	TauNS     int64        `json:"tau_ns"`
	Initial   float64      `json:"initial_pages_per_second"`
	Deviation float64      `json:"deviation"`
	Points    []curvePoint `json:"points"`
}

type curvePoint struct {
	TimeNS int64   `json:"time_ns"`
	Pages  float64 `json:"pages"`
}

type sharesResult struct {
	Pages        int     `json:"pages_looked_at"`
	Zero         float64 `json:"zero"`
	FalseDirty   float64 `json:"false_dirty"`
	Duplicate    float64 `json:"duplicate"`
	Compressible float64 `json:"compressible"`
	Ratio        float64 `json:"compressed_ratio"`
}

type blockRate struct {
	Name     string  `json:"name"`
	Bytes    uint64  `json:"bytes"`
	Rate     float64 `json:"dirty_pages_per_second"`
	WSSBytes uint64  `json:"wss_bytes"`
}

type untrackedBlock struct {
	Name   string `json:"name"`
	Bytes  uint64 `json:"bytes"`
	Reason string `json:"reason"`
}

type blockHeat struct {
	Name        string    `json:"name"`
	Bytes       uint64    `json:"bytes"`
	RegionBytes uint64    `json:"region_bytes"`
	Heat        []float64 `json:"dirty_pages_per_second"`
}

// inheritedLock is the descriptor of --locked.
const inheritedLock = 3

// whileHeld ends with standard input, which whoever passed on the lock holds open as long as
// he lives: nobody is to be kept from the VM by what nobody waits for.
func whileHeld(ctx context.Context) (held context.Context, done func()) {
	held, cancel := context.WithCancel(ctx)
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return held, cancel
}

// takeUserfaultfd makes a userfaultfd in QEMU and leaves nothing there.
func takeUserfaultfd(ctx context.Context, pid int, vcpus []int) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, injectTimeout)
	defer cancel()
	f, _, err := inject.Userfaultfd(ctx, pid, inject.Options{VCPUs: vcpus})
	return f, err
}

func runDirtyRate(c *cobra.Command, a *app, o *dirtyRateOptions, arg string) (err error) {
	pid, err := parsePID(arg)
	if err != nil {
		return err
	}
	if err := o.check(); err != nil {
		return err
	}
	r := &dirtyRateResult{Schema: schema("dirty-rate"), PID: pid, Method: o.method}
	counter := o.counter(r)
	if counter != nil {
		defer func() { err = errors.Join(err, counter.Close()) }()
	}
	ctx := c.Context()
	mo := signals.MemoryOptions{QMP: o.qmp, Take: takeUserfaultfd, Counter: counter}
	if o.locked {
		var done func()
		ctx, done = whileHeld(ctx)
		defer done()
		unix.CloseOnExec(inheritedLock)
		mo.Lock = os.NewFile(inheritedLock, "lock")
	}
	m, err := signals.OpenMemory(ctx, pid, mo)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := r.measure(ctx, a, o, m); err != nil {
		return m.Explain(err)
	}
	if o.png != "" {
		if err := writePNG(o.png, r.heatMap()); err != nil {
			return err
		}
	}
	if a.json {
		if !o.heatmap {
			r.Heat = nil
		}
		a.print("dirty-rate", r)
		return nil
	}
	return r.text(a, o)
}

// counter loads the live counter, which exact measurements use if there is one.
func (o *dirtyRateOptions) counter(r *dirtyRateResult) *dirty.Counter {
	if o.method != "exact" {
		return nil
	}
	counter, err := dirty.Load()
	if err != nil {
		r.Notes = append(r.Notes, fmt.Sprintf("no live counter, the page map alone is used: %v", err))
		return nil
	}
	return counter
}

// measure runs the measurement. An interrupt ends it early with what there is.
func (r *dirtyRateResult) measure(ctx context.Context, a *app, o *dirtyRateOptions, m *signals.Memory) error {
	r.VM, r.PageBytes, r.RAMBytes = m.Name, 4096, m.Pages()*4096
	for _, s := range m.Skipped {
		r.Untracked = append(r.Untracked, untrackedBlock{s.Name, s.Bytes, s.Reason})
	}
	var err error
	if o.method == "sampled" {
		err = r.sampled(ctx, a, o, m)
	} else {
		err = r.exact(ctx, a, o, m)
	}
	if err != nil && r.Intervals > 0 && ctx.Err() != nil && m.Explain(err) == err {
		r.Notes = append(r.Notes, fmt.Sprintf("interrupted after %v", time.Duration(r.TimeNS).Round(time.Millisecond)))
		return nil
	}
	return err
}

func (r *dirtyRateResult) exact(ctx context.Context, a *app, o *dirtyRateOptions, m *signals.Memory) error {
	e, err := m.MeasureExact(ctx, o.duration, o.interval, func(pages uint64, took time.Duration) {
		a.log.Debug("interval", "pages", pages, "took", took)
	})
	if e == nil {
		return err
	}
	r.IntervalNS, r.TimeNS, r.Intervals = e.Interval.Nanoseconds(), e.Time.Nanoseconds(), e.Epochs
	r.Rate, r.Spread, r.Peak, r.WSSBytes, r.ArmedShare = e.Rate, e.Spread, e.Peak, e.WSSPages*r.PageBytes, 1
	r.BusyNS = e.ArmNS + e.ScanNS
	if e.HasLive {
		r.Live = &liveResult{Program: "tp_btf/page_fault_user", Pages: e.Live}
	}
	r.curve(&e.Curve)
	for i, b := range m.Blocks {
		r.Blocks = append(r.Blocks, blockRate{b.Name, b.Bytes, e.Blocks[i].Rate, e.Blocks[i].WSSPages * r.PageBytes})
		h := blockHeat{Name: b.Name, Bytes: b.Bytes, RegionBytes: track.HeatPages * r.PageBytes}
		for _, n := range e.Heat[i] {
			h.Heat = append(h.Heat, float64(n)/e.Time.Seconds())
		}
		r.Heat = append(r.Heat, h)
	}
	return err
}

// contentPages are read per window to see what they are made of.
const contentPages = 256

func (r *dirtyRateResult) sampled(ctx context.Context, a *app, o *dirtyRateOptions, m *signals.Memory) error {
	s, err := m.MeasureSampled(ctx, o.duration, o.interval, track.SampleConfig{Precision: o.precision, MaxShare: o.share, Content: contentPages},
		func(w track.Window) {
			a.log.Debug("window", "pages_per_second", w.Rate, "error", w.Error, "armed", w.Armed)
		})
	if s == nil {
		return err
	}
	r.IntervalNS, r.TimeNS, r.Intervals = s.Interval.Nanoseconds(), s.Time.Nanoseconds(), s.Windows
	r.Rate, r.Error, r.ArmedShare, r.BusyNS = s.Rate, s.Error, s.Armed, s.Busy.Nanoseconds()
	r.Spread, r.Peak = s.Spread, s.Peak
	r.WSSBytes, r.WSSErrorBytes = uint64(s.WSSPages*4096), uint64(s.WSSError*4096)
	if s.WSSOver == 0 {
		r.Notes = append(r.Notes, "too few windows to estimate the working set")
	}
	r.curve(s.Curve)
	if s.Shares != nil {
		r.Shares = &sharesResult{s.Shares.Pages, s.Shares.Zero, s.Shares.FalseDirty, s.Shares.Duplicate, s.Shares.Compressible, s.Shares.Ratio}
	}
	for i, b := range m.Blocks {
		br := s.Blocks[i]
		r.Blocks = append(r.Blocks, blockRate{b.Name, b.Bytes, br.Rate, br.WSSPages * r.PageBytes})
		r.Heat = append(r.Heat, blockHeat{Name: b.Name, Bytes: b.Bytes, RegionBytes: track.HeatPages * r.PageBytes, Heat: s.Heat[i]})
	}
	return err
}

func (r *dirtyRateResult) curve(c *estimate.Curve) {
	f, ok := c.Fit()
	if !ok {
		return
	}
	r.Curve = &curveResult{Pages: f.Pages, TauNS: f.Tau.Nanoseconds(), Initial: f.Initial(), Deviation: f.Error}
	for _, p := range c.Points() {
		r.Curve.Points = append(r.Curve.Points, curvePoint{p.T.Nanoseconds(), p.Pages})
	}
}

func (r *dirtyRateResult) heatMap() heatmap.Map {
	m := heatmap.Map{Unit: "pages/s"}
	for _, h := range r.Heat {
		m.Blocks = append(m.Blocks, heatmap.Block{Name: h.Name, Bytes: h.Bytes, RegionBytes: h.RegionBytes, Heat: h.Heat})
	}
	return m
}

func writePNG(path string, m heatmap.Map) error {
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(m.PNG(f), f.Close())
	}
	if err != nil {
		return problem.New(problem.Failed, "write picture", path, "%w", err)
	}
	return nil
}

func (r *dirtyRateResult) text(a *app, o *dirtyRateOptions) error {
	interval := time.Duration(r.IntervalNS).Round(time.Millisecond)
	fmt.Fprintf(a.out, "VM %s, pid %d: %.0f pages/s", dash(r.VM), r.PID, r.Rate)
	if r.Method == "sampled" {
		fmt.Fprintf(a.out, " +- %.0f (95 %%, %.1f %% of memory armed)", r.Error, 100*r.ArmedShare)
	}
	fmt.Fprintf(a.out, " = %s/s dirtied, %d intervals of %v, peak %.0f; %s of %s written in all\n",
		sizeText(uint64(r.Rate*float64(r.PageBytes))), r.Intervals, interval, r.Peak, sizeText(r.WSSBytes), sizeText(r.RAMBytes))
	if c := r.Curve; c != nil {
		fmt.Fprintf(a.out, "G(T) = %.0f pages (1 - exp(-T/%v)), off by %.1f %%; %.0f pages/s right after an arm\n",
			c.Pages, time.Duration(c.TauNS).Round(time.Millisecond), 100*c.Deviation, c.Initial)
	}
	if s := r.Shares; s != nil {
		fmt.Fprintf(a.out, "of what is written: %.0f %% zero, %.0f %% same content as before, %.0f %% duplicate, %.0f %% compress to half; %.2f of the size compressed (%d pages looked at)\n",
			100*s.Zero, 100*s.FalseDirty, 100*s.Duplicate, 100*s.Compressible, s.Ratio, s.Pages)
	}
	var rows [][]string
	for _, b := range r.Blocks {
		rows = append(rows, []string{b.Name, sizeText(b.Bytes), fmt.Sprintf("%.1f", b.Rate), sizeText(b.WSSBytes)})
	}
	a.table([]string{"BLOCK", "SIZE", "PAGES/S", "WRITTEN"}, rows)
	for _, n := range r.Notes {
		fmt.Fprintf(a.out, "note: %s\n", n)
	}
	if o.heatmap {
		return r.heatMap().Text(a.out)
	}
	return nil
}
