package bench

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/tools/bench/report"
)

// checkpointSpec is one guest on which the ways are compared, and how often: on
// gens guests of each way in turn, each of them percent of the run's rounds times.
type checkpointSpec struct {
	name    string
	guest   guestSpec
	gens    int
	percent int
	least   int
	curve   bool // a point of the picture of pauses
	goals   checkpointGoals
}

// checkpointGoals says which goals are stated for this guest.
type checkpointGoals struct {
	pause, devices, total, first bool
}

var checkpointSpecs = []checkpointSpec{
	{"1g-huge", guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2}, 4, 17, 5, false, checkpointGoals{first: true}},
	{"1g-4k", guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2, small: true}, 1, 34, 5, true, checkpointGoals{}},
	{"2g-4k", guestSpec{memoryMiB: 2048, usedMiB: 1024, devices: 2, small: true}, 1, 17, 4, true, checkpointGoals{total: true}},
	{"3g-huge", guestSpec{memoryMiB: 3072, usedMiB: 2048, devices: 2}, 2, 10, 3, false, checkpointGoals{first: true}},
	{"3g-4k", guestSpec{memoryMiB: 3072, usedMiB: 2048, devices: 2, small: true}, 1, 17, 4, true, checkpointGoals{}},
	{"5g-4k", guestSpec{memoryMiB: 5120, usedMiB: 4096, devices: 2, small: true}, 1, 14, 4, true, checkpointGoals{pause: true, total: true}},
	{"12dev", guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 12}, 1, 27, 4, false, checkpointGoals{devices: true}},
}

// way is one way with a guest of its own.
type way struct {
	name  string
	op    operation
	guest *guest
	first report.Figures // of the first checkpoint of each guest
	later report.Figures // from the third one on
	last  *observation
}

func (b *bench) checkpoints(ctx context.Context, s checkpointSpec) error {
	ways := []*way{{name: wayOurs, op: b.ckagent}, {name: waySnapshot, op: b.backgroundSnapshot}, {name: wayStopCopy, op: b.stopAndCopy}, {name: wayUffd, op: b.uffd}}
	table := stageTable{title: s.guest.String()}
	var device report.Figures
	rounds, gens := b.rounds(s.percent, s.least), s.gens
	if b.Quick {
		rounds, gens = 3, 1
	}
	for range gens {
		if err := b.generation(ctx, s, ways, rounds, &table, &device); err != nil {
			return err
		}
	}
	b.stages = append(b.stages, table)
	b.checkpointRows(s, ways, &device)
	if s.curve {
		for _, w := range ways {
			b.curve[w.name] = append(b.curve[w.name], report.Point{X: float64(s.guest.usedMiB), Y: w.later.Get(fPause).Median() / 1e6})
		}
	}
	chart := report.Chart{Title: "Silences of a spinning vCPU: " + s.guest.String(), XLabel: "seconds since the command", YLabel: "silence (ms)", Spikes: true}
	for _, w := range slices.Backward(ways) {
		chart.Series = append(chart.Series, report.Series{Name: w.name, Points: w.last.gaps})
	}
	b.out.Charts["timeline-"+s.name+".svg"] = chart
	return nil
}

// launchGuests boots a guest for each way and stops it until it is measured.
func launchGuests(ctx context.Context, ways []*way, s guestSpec) (err error) {
	for _, w := range ways {
		if w.guest, err = launch(ctx, s); err != nil {
			return err
		}
		if err := w.guest.stop(ctx); err != nil {
			return err
		}
	}
	return nil
}

// closeGuests ends the guests that there are.
func closeGuests(ways []*way) {
	for _, w := range ways {
		if w.guest != nil {
			w.guest.close()
			w.guest = nil
		}
	}
}

// generation measures on one fresh guest of each way, in alternation.
func (b *bench) generation(ctx context.Context, s checkpointSpec, ways []*way, rounds int, table *stageTable, device *report.Figures) error {
	defer closeGuests(ways)
	if err := launchGuests(ctx, ways, s.guest); err != nil {
		return err
	}
	for round := range rounds {
		for _, w := range ways {
			if err := b.oneCheckpoint(ctx, w, round, table, device); err != nil {
				return fmt.Errorf("%s, checkpoint %d: %w", w.name, round+1, err)
			}
		}
		b.Log("%s: round %d of %d", s.name, round+1, rounds)
	}
	for _, w := range ways {
		if r := w.guest.Report(); r.Check() != nil {
			return fmt.Errorf("the guest of %s: %w", w.name, r.Check())
		}
	}
	return nil
}

func (b *bench) oneCheckpoint(ctx context.Context, w *way, round int, table *stageTable, device *report.Figures) error {
	dir, err := os.MkdirTemp(b.dir, "checkpoint-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	g := w.guest
	o, err := g.measure(ctx, dir, w.op)
	if err != nil {
		return err
	}
	if w.name == wayOurs {
		if err := b.beside(ctx, g, dir, o, device); err != nil {
			return err
		}
		took, err := attachTime(ctx, g.PID())
		if err != nil {
			return err
		}
		table.add(round, append(o.stages, stage{"of which attaching (process, monitor, layout, description), by itself", took}))
	}
	w.last = o
	into := []*report.Figures{}
	switch {
	case round == 0:
		into = append(into, &w.first)
	case round >= 2:
		into = append(into, &w.later)
	}
	for _, f := range into {
		for name, v := range o.figures {
			f.Add(name, v)
		}
	}
	return g.stop(ctx)
}

// beside takes what our figures are held against on the same guest, right after
// them: the same time with nothing going on, the device state alone, and write(2) of
// as many bytes.
func (b *bench) beside(ctx context.Context, g *guest, dir string, o *observation, device *report.Figures) error {
	calm, ok, err := g.calm(ctx, 2*window+time.Duration(o.figures[fTotal]))
	if err != nil {
		return err
	}
	if ok {
		o.figures[fCalm] = calm
	}
	d, _, err := b.deviceState(ctx, g, dir)
	if err != nil {
		return err
	}
	device.Add(fDevice, d[fDevice])
	// The checkpoint makes room first: both lie in memory.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if o.figures[fRaw], err = writeSpeed(ctx, filepath.Join(dir, "raw"), int64(o.figures[fBytes]), false); err != nil {
		return err
	}
	seen := o.figures[fAtPause]
	if own := o.figures[fOwnPause]; seen > 0 && own > 0 {
		o.figures[fSeenBias] = math.Abs(own-seen) / seen
	}
	return nil
}

// attachTime is how long it takes to attach to a VM, in a program that runs already.
func attachTime(ctx context.Context, pid int) (ns float64, err error) {
	begin := monotonic()
	v, err := agent.Attach(ctx, pid, agent.Options{})
	if err != nil {
		return 0, err
	}
	ns = monotonic() - begin
	return ns, v.Close()
}

// writeSpeed writes n bytes by write(2) in pieces of 1 MiB and returns bytes per
// second. What is written comes from a buffer larger than the processor's caches,
// as a guest's RAM is.
func writeSpeed(ctx context.Context, path string, n int64, sync bool) (float64, error) {
	const size, piece = 256 << 20, 1 << 20
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(buf) }() // of our own mapping: cannot fail
	for i := 0; i < size; i += 512 {
		buf[i] = byte(i>>12) | 1
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	begin := monotonic()
	for done := int64(0); done < n; done += piece {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if _, err := f.Write(buf[done%size:][:min(piece, n-done)]); err != nil {
			return 0, err
		}
	}
	if sync {
		if err := f.Sync(); err != nil {
			return 0, err
		}
	}
	return float64(n) / (monotonic() - begin) * 1e9, nil
}

func monotonic() float64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // always there
	return float64(ts.Nano())
}

// checkpointRows makes the table of one guest.
func (b *bench) checkpointRows(s checkpointSpec, ways []*way, device *report.Figures) {
	group := "Checkpoint: " + s.guest.String()
	ours := ways[0]
	gib := float64(s.guest.usedMiB) / 1024
	add := func(id, what, fig string, unit report.Unit, peers []*way, goal report.Goal) {
		for _, p := range peers {
			for _, when := range []struct {
				id, text  string
				ours, his *report.Figures
			}{{"first", "first", &ours.first, &p.first}, {"later", "third on", &ours.later, &p.later}} {
				a, z := when.ours.Get(fig), when.his.Get(fig)
				if len(a) == 0 {
					continue
				}
				r := report.Row{ID: s.name + "/" + id + "/" + when.id + "/" + p.name, Group: group, What: what + ", " + when.text,
					Unit: unit, Ours: a.Median(), Peer: z.Median(), PeerName: p.name, N: len(a)}
				if len(z) > 0 {
					r.N = min(len(a), len(z))
				}
				if when.id == "later" || (id == "pause" && s.goals.first) {
					r.Goal = goal
				}
				if id == "pause" && when.id == "first" && s.goals.first && p.name == waySnapshot {
					r.Goal = report.Goal{Text: "≤ 1.5x", Ratio: 1.5}
				} else if id == "pause" && s.goals.first {
					r.Goal = report.Goal{}
				}
				b.row(r)
			}
		}
	}
	snapshot, both := ways[1:2], ways[1:]
	var pause, total report.Goal
	if s.goals.pause {
		pause = report.Goal{Text: "≤ 0.5x background-snapshot", Ratio: 0.5}
	}
	if s.goals.total {
		total = report.Goal{Text: "≤ 0.5x background-snapshot", Ratio: 0.5}
	}
	add("pause", "pause (STOP to RESUME)", fPause, report.Nanoseconds, snapshot, pause)
	add("pause", "pause (STOP to RESUME)", fPause, report.Nanoseconds, ways[2:], report.Goal{})
	rest, uffd := ours.later.Get(fRest), ways[3]
	b.row(report.Row{ID: s.name + "/rest", Group: group, What: "pause minus device state, third on", Ours: rest.Median(),
		Peer: uffd.later.Get(fRest).Median(), PeerName: uffd.name, N: len(rest),
		Goal: report.Goal{Text: "≤ 1 ms + 0.3 ms per GiB used", Value: 1e6 + 0.3e6*gib}})
	devGoal := report.Goal{}
	if s.goals.devices {
		devGoal = report.Goal{Text: "≤ 1.1x the device state", Ratio: 1.1}
	}
	all := ours.later.Get(fPause)
	b.row(report.Row{ID: s.name + "/pause-device", Group: group, What: "pause against the device state alone, third on", Ours: all.Median(),
		Peer: device.Get(fDevice).Median(), PeerName: wayDeviceOnly, N: len(all), Goal: devGoal})
	add("gap", "longest gap a spinning vCPU saw, ±1 s", fGap, report.Nanoseconds, both, report.Goal{})
	gap := ours.later.Get(fGap)
	b.row(report.Row{ID: s.name + "/gap-pause", Group: group, What: "longest gap against the pause, third on", Ours: gap.Median(),
		Peer: all.Median(), PeerName: "pause", N: len(gap), Goal: report.Goal{Text: "≤ pause + 5 ms", Ratio: 1, Slack: 5e6}})
	bias := ours.later.Get(fSeenBias)
	b.row(report.Row{ID: s.name + "/bias", Group: group, What: "pause_ns against what the guest saw: difference", Unit: report.Percent, Ours: bias.Median(),
		Peer: math.NaN(), N: len(bias), Goal: report.Goal{Text: "≤ 20 %", Value: 0.2}})
	calm := ours.later.Get(fCalm)
	b.row(report.Row{ID: s.name + "/calm", Group: group, What: "longest gap in as long a time, nothing going on, third on", Ours: calm.Median(), Peer: math.NaN(), N: len(calm)})
	add("total", "total (command to its end)", fTotal, report.Nanoseconds, snapshot, total)
	add("total", "total (command to its end)", fTotal, report.Nanoseconds, ways[2:], report.Goal{})
	add("lost", "guest work lost meanwhile", fLost, report.Percent, both, report.Goal{})
	b.lostRow(s, ours, ways[1], group)
	add("cpu", "processor time outside the vCPU", fCPU, report.Seconds, both, report.Goal{})
	if !s.guest.small {
		add("huge", "huge pages left afterwards", fHuge, report.Percent, snapshot, report.Goal{})
	}
	add("bytes", "bytes written", fBytes, report.Bytes, both, report.Goal{})
	speed, raw := ours.later.Get(fSpeed), ours.later.Get(fRaw)
	b.row(report.Row{ID: s.name + "/scan", Group: group, What: "pages to the store, no compression, no fsync", Unit: report.PerSecond, Ours: speed.Median(),
		Peer: raw.Median(), PeerName: "write(2), same bytes", N: len(speed), Goal: report.Goal{Text: "≥ 70 %", Ratio: 0.7, AtLeast: true}})
	p50, p99 := uffd.later.Get(fFaultP50), uffd.later.Get(fFaultP99)
	b.row(report.Row{ID: s.name + "/fault-p50", Group: group, What: "engine uffd: service of a first write, server's median", Ours: p50.Median(), Peer: math.NaN(), N: len(p50),
		Goal: report.Goal{Text: "≤ 10 µs", Value: 10e3}})
	b.row(report.Row{ID: s.name + "/fault-p99", Group: group, What: "engine uffd: service of a first write, server's 99th percentile", Ours: p99.Median(), Peer: math.NaN(), N: len(p99)})
}

// lostRow holds the work lost, in seconds of it, against the peer's: the share of
// the time it takes would favour who takes longer.
func (b *bench) lostRow(s checkpointSpec, ours, peer *way, group string) {
	a, z := ours.later.Get(fLostTime), peer.later.Get(fLostTime)
	b.row(report.Row{ID: s.name + "/lost-time", Group: group, What: "guest work lost, as time, third on", Ours: a.Median(), Peer: z.Median(), PeerName: peer.name,
		N: min(len(a), len(z)), Goal: report.Goal{Text: "≤ 1/3 of background-snapshot", Ratio: 1.0 / 3}})
}

// pauseChart draws how the pauses follow the RAM used.
func (b *bench) pauseChart() {
	if len(b.curve) == 0 {
		return
	}
	c := report.Chart{Title: "Pause by RAM used (4 KiB pages, third checkpoint on)", XLabel: "RAM used (MiB)", YLabel: "pause (ms)"}
	for _, name := range []string{wayOurs, wayUffd, waySnapshot, wayStopCopy} {
		c.Series = append(c.Series, report.Series{Name: name, Points: b.curve[name]})
	}
	b.out.Charts["pause.svg"] = c
}

// onDisk compares whole checkpoints on a disk file system, fsync on both sides.
func (b *bench) onDisk(ctx context.Context) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(b.Disk, &fs); err != nil {
		return err
	}
	if fs.Type == unix.TMPFS_MAGIC {
		return problem.New(problem.Usage, "bench", b.Disk, "it lies in memory").WithHint("name a directory on a disk with -disk")
	}
	spec := guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2}
	g, err := launch(ctx, spec)
	if err != nil {
		return err
	}
	defer g.close()
	var f report.Figures
	for range b.rounds(17, 3) {
		dir, err := os.MkdirTemp(b.Disk, "ckagent-bench-")
		if err != nil {
			return err
		}
		err = func() error {
			defer os.RemoveAll(dir)
			o, err := g.measure(ctx, dir, b.ckagent)
			if err != nil {
				return err
			}
			f.Add("whole", o.figures[fBytes]/o.figures[fTotal]*1e9)
			if v, ok := o.figures[fDurable]; ok {
				f.Add("ours", v)
			}
			raw, err := writeSpeed(ctx, filepath.Join(dir, "raw"), int64(o.figures[fBytes]), true)
			f.Add("raw", raw)
			return err
		}()
		if err != nil {
			return err
		}
	}
	group := "On disk, fsync on both sides: " + spec.String()
	row := func(id, what, fig string, goal report.Goal) {
		b.row(report.Row{ID: "disk/" + id, Group: group, What: what, Unit: report.PerSecond, Ours: f.Get(fig).Median(), Peer: f.Get("raw").Median(),
			PeerName: "write(2) + fsync, same bytes", N: len(f.Get(fig)), Goal: goal})
	}
	row("throughput", "bytes stored, guest runs again to committed", "ours", report.Goal{Text: "≥ 70 %", Ratio: 0.7, AtLeast: true})
	row("whole", "bytes stored by the whole command's time", "whole", report.Goal{})
	return nil
}
