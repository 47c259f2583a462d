package diskcopy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// Set is the disks of one checkpoint.
type Set struct {
	c       Config
	dir     string // of the volumes
	items   []*item
	parents map[string]*store.Image
	reqs    []*qmp.Request
	inGraph bool // something of ours may be in QEMU
}

// item is one disk.
type item struct {
	n      int
	src    *vm.DiskSource
	base   *base // nil: the whole disk is copied
	volume string
	file   *os.File // the volume
	memory *os.File // for old content; nil with an overlay

	overlay string   // path of its overlay, with overlays
	above   *os.File // that
}

// NeededBytes estimates what the copies will store.
func (s *Set) NeededBytes() uint64 {
	var need uint64
	for _, d := range s.items {
		if d.base != nil {
			need += d.base.dirty
		} else {
			need += min(d.src.Used, d.src.Bytes)
		}
		need += d.src.Bytes/4096 + 1<<20 // tables: 8 bytes per 64 KiB, twice at most
	}
	return need
}

// Plan decides for each disk what to copy. It touches nothing in QEMU.
func Plan(ctx context.Context, c Config) (_ *Set, err error) {
	if c.Stall == 0 {
		c.Stall = DefaultStall
	}
	s := &Set{c: c, parents: map[string]*store.Image{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeParents())
		}
	}()
	for i := range c.Sources {
		d := &item{n: i, src: &c.Sources[i], volume: image.VolumeName(c.Txn.ID(), i)}
		if d.base, err = s.findBase(ctx, d); err != nil {
			return nil, err
		}
		if c.Overlay != nil {
			if d.overlay, err = s.overlayFile(d); err != nil {
				return nil, err
			}
		}
		s.items = append(s.items, d)
	}
	return s, nil
}

// Prepare makes the volumes and lends them to QEMU. Whatever it returns, Drop is to
// be called unless Keep is.
func (s *Set) Prepare(ctx context.Context) error {
	if len(s.items) == 0 {
		return nil
	}
	var err error
	if s.dir, err = s.c.Txn.VolumeDir(ctx); err != nil {
		return err
	}
	limit, err := s.c.memory()
	if err != nil {
		return err
	}
	s.inGraph = true
	if err := s.dropStaleBitmaps(ctx); err != nil {
		return err
	}
	for _, d := range s.items {
		if d.src.File == "" { // else the volume is as large as the image will be then
			if err := s.addVolume(ctx, d, d.src.Bytes); err != nil {
				return err
			}
		}
		if s.c.Overlay != nil {
			if err := s.addOverlay(ctx, d); err != nil {
				return err
			}
			continue
		}
		if d.memory, err = makeMemory(ctx, d.src.Bytes, limit); err != nil {
			return err
		}
		if err := s.lend(ctx, disk.FleeceNode(d.n), disk.FdsetOpaque, d.memory, nil); err != nil {
			return err
		}
	}
	if s.c.Overlay != nil {
		s.reqs, err = s.encode(true)
		return err
	}
	early, err := s.filtersEarly(ctx)
	if err != nil {
		return err
	}
	for _, d := range s.items {
		if !early {
			break
		}
		if err := s.c.QMP.Execute(ctx, "blockdev-add", filter(d, false), nil); err != nil {
			return s.failed("add a filter", d, err)
		}
	}
	s.reqs, err = s.encode(early)
	return err
}

// filtersEarly reports whether filters may be made before the pause, which is shorter
// then. Not with I/O threads, which use the nodes meanwhile.
func (s *Set) filtersEarly(ctx context.Context) (bool, error) {
	var threads []struct {
		ID string `json:"id"`
	}
	if err := s.c.QMP.Execute(ctx, "query-iothreads", nil, &threads); err != nil {
		return false, fmt.Errorf("query-iothreads: %w", err)
	}
	return len(threads) == 0, nil
}

// filter describes the filter over a disk. Made in the pause it keeps only what the
// checkpoint needs; made before, when that is not known yet, all that is overwritten.
func filter(d *item, inPause bool) map[string]any {
	args := map[string]any{"driver": "copy-before-write", "node-name": disk.FilterNode(d.n),
		"file": d.src.Root, "target": disk.FleeceNode(d.n), "on-cbw-error": "break-snapshot"}
	if inPause && d.base != nil {
		args["bitmap"] = bitmapArgs(d.src.Tracked(), d.base.bitmap)
	}
	return args
}

// dropStaleBitmaps removes those that nothing can be continued from.
func (s *Set) dropStaleBitmaps(ctx context.Context) error {
	for _, d := range s.items {
		for _, b := range d.src.Own() {
			if d.base != nil && d.base.bitmap == b.Name {
				continue
			}
			if err := s.c.QMP.Execute(ctx, "block-dirty-bitmap-remove", bitmapArgs(d.src.Tracked(), b.Name), nil); err != nil {
				return s.failed("remove an old bitmap", d, err)
			}
		}
	}
	return nil
}

// lend makes a block node of a qcow2 file that QEMU gets as a descriptor: it needs no
// right to the path. more are further options of the node, aio a way to do its I/O that is
// better than by threads, where this QEMU and its kernel have it.
//
// Volumes are written by io_uring: QEMU's pool of threads is the guest's as well, and
// counts on a thread that has just been given something else to do. Behind writes to a
// store that hangs, a request of the guest may lie in its queue for as long.
func (s *Set) lend(ctx context.Context, node, opaque string, f *os.File, more map[string]any, aio ...string) error {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := s.c.QMP.ExecuteFD(ctx, "add-fd", map[string]string{"opaque": opaque}, &set, f); err != nil {
		return fmt.Errorf("lend %s: %w", node, err)
	}
	file := map[string]any{"driver": "file", "filename": fmt.Sprintf("/dev/fdset/%d", set.ID), "locking": "off"}
	options := map[string]any{"driver": "qcow2", "node-name": node, "backing": nil, "file": file}
	maps.Copy(options, more)
	var err error
	for _, way := range append(aio, "threads") { // which is what QEMU takes by itself
		file["aio"] = way
		if err = s.c.QMP.Execute(ctx, "blockdev-add", options, nil); err == nil {
			return nil
		}
	}
	return fmt.Errorf("add %s: %w", node, err)
}

// bitmapGranularity is the cluster size of volumes: less of one cannot be copied.
const bitmapGranularity = 64 << 10

func bitmapArgs(node, name string) map[string]any {
	return map[string]any{"node": node, "name": name}
}

// encode prepares the commands that fix the instant.
func (s *Set) encode(early bool) ([]*qmp.Request, error) {
	type action struct {
		Type string         `json:"type"`
		Data map[string]any `json:"data"`
	}
	var actions []action
	var out []*qmp.Request
	add := func(command string, args any) error {
		r, err := qmp.Encode(command, args)
		out = append(out, r)
		return err
	}
	for _, d := range s.items {
		fresh := bitmapArgs(d.src.Tracked(), s.bitmap())
		fresh["granularity"] = bitmapGranularity
		actions = append(actions, action{"block-dirty-bitmap-add", fresh})
		if d.base != nil {
			// From here on it says what belongs to this checkpoint, and no more.
			actions = append(actions, action{"block-dirty-bitmap-disable", bitmapArgs(d.src.Tracked(), d.base.bitmap)})
		}
		if s.c.Overlay != nil {
			actions = append(actions, action{"blockdev-snapshot", switchAction(d)})
		}
	}
	if err := add("transaction", map[string]any{"actions": actions}); err != nil || s.c.Overlay != nil {
		return out, err
	}
	for _, d := range s.items {
		if !early {
			if err := add("blockdev-add", filter(d, true)); err != nil {
				return nil, err
			}
		}
		if err := add("qom-set", map[string]any{"path": d.src.Device, "property": "drive", "value": disk.FilterNode(d.n)}); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// bitmap is the name of the bitmaps that begin with this checkpoint.
func (s *Set) bitmap() string { return disk.BitmapName(s.c.Txn.ID()) }

// Requests are the commands for the pause, in their order.
func (s *Set) Requests() []*qmp.Request { return s.reqs }

// Confirm waits for the replies to Requests.
func (s *Set) Confirm(ctx context.Context, calls []*qmp.Call) error {
	var errs []error
	for _, c := range calls {
		if err := c.Wait(ctx, nil); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return problem.New(problem.Failed, "take the disks", "VM "+s.c.VM, "%w", err).
			WithHint("a device that cannot be given a filter while it runs: detach it, or leave disks out with --disks none")
	}
	return nil
}

// Start starts the copies. The machine runs again.
func (s *Set) Start(ctx context.Context) (err error) {
	if err := s.storeAnswers(ctx); err != nil {
		return err
	}
	for _, d := range s.items {
		snap := disk.SnapNode(d.n)
		if s.c.Overlay != nil {
			if snap, err = s.frozen(ctx, d); err != nil {
				return err
			}
		} else if err := s.c.QMP.Execute(ctx, "blockdev-add", map[string]any{"driver": "snapshot-access", "node-name": snap, "file": disk.FilterNode(d.n)}, nil); err != nil {
			return s.failed("read the disk's instant", d, err)
		}
		job := map[string]any{"job-id": disk.CopyJob(d.n), "device": snap, "target": disk.TargetNode(d.n), "sync": "full",
			"speed": s.speed(d), "auto-dismiss": false, "on-source-error": "report", "on-target-error": "report",
			"x-perf": map[string]any{"max-workers": 8}}
		if d.base != nil {
			if err := s.delta(ctx, d, snap); err != nil {
				return err
			}
			job["sync"], job["bitmap"], job["bitmap-mode"] = "bitmap", disk.DeltaBitmap, "never"
		}
		if err := s.c.QMP.Execute(ctx, "blockdev-backup", job, nil); err != nil {
			return s.failed("copy", d, err)
		}
	}
	return nil
}

// speed is the most to copy of a disk per second. QEMU counts zeros too, which cost
// next to nothing: by default they are left out as far as that can be told.
func (s *Set) speed(d *item) uint64 {
	if s.c.SpeedBytes != 0 {
		return s.c.SpeedBytes
	}
	if d.base == nil && d.src.Used < d.src.Bytes {
		return DefaultSpeed * max(1, d.src.Bytes/max(d.src.Used, DefaultSpeed/4))
	}
	return DefaultSpeed
}

// delta puts what is to be copied on the node that is copied from.
func (s *Set) delta(ctx context.Context, d *item, snap string) error {
	args := bitmapArgs(snap, disk.DeltaBitmap)
	args["disabled"] = true
	err := s.c.QMP.Execute(ctx, "block-dirty-bitmap-add", args, nil)
	if err == nil {
		err = s.c.QMP.Execute(ctx, "block-dirty-bitmap-merge", map[string]any{
			"node": snap, "target": disk.DeltaBitmap, "bitmaps": []any{bitmapArgs(d.src.Tracked(), d.base.bitmap)}}, nil)
	}
	if err != nil {
		return s.failed("copy", d, err)
	}
	return nil
}

const (
	jobPoll = 250 * time.Millisecond // should an event be lost
)

// Wait waits until every copy is whole. The guest does not wait for any of them.
func (s *Set) Wait(ctx context.Context) error {
	if len(s.items) == 0 {
		return nil
	}
	events := s.c.QMP.Subscribe(16, "JOB_STATUS_CHANGE")
	defer events.Close()
	tick := time.NewTicker(jobPoll)
	defer tick.Stop()
	var last uint64
	moved := time.Now()
	for {
		jobs, err := disk.ReadJobs(ctx, s.c.QMP)
		if err != nil {
			return err
		}
		left, progress, err := s.look(jobs)
		if err != nil || left == 0 {
			return err
		}
		if err := s.roomy(); err != nil {
			return err
		}
		if progress != last {
			last, moved = progress, time.Now()
		} else if time.Since(moved) > s.c.Stall {
			return problem.New(problem.Store, "copy disks", "VM "+s.c.VM, "nothing was copied for %v", s.c.Stall).
				WithHint("the store hangs, or the disk itself does; the checkpoint was given up and the VM goes on")
		}
		select {
		case <-events.C():
		case <-tick.C:
		case <-ctx.Done():
			return problem.New(problem.Cancelled, "copy disks", "VM "+s.c.VM, "%w", context.Cause(ctx))
		}
	}
}

// look counts the copies that go on, and adds up how far all of them are.
func (s *Set) look(jobs []disk.Job) (left int, progress uint64, err error) {
	for _, d := range s.items {
		var job *disk.Job
		for i := range jobs {
			if jobs[i].ID == disk.CopyJob(d.n) {
				job = &jobs[i]
			}
		}
		switch {
		case job == nil:
			return 0, 0, problem.New(problem.Busy, "copy", "disk "+d.src.Drive.Name, "its job was taken away by somebody").
				WithHint("take the checkpoint again")
		case !job.Over():
			left++
			progress += job.Progress
		case job.Error != "":
			return 0, 0, s.explain(d, job.Error)
		case job.Progress < job.Total:
			return 0, 0, problem.New(problem.Busy, "copy", "disk "+d.src.Drive.Name, "its job was cancelled by somebody").
				WithHint("take the checkpoint again")
		default:
			progress += job.Progress
		}
	}
	return left, progress, nil
}

func (s *Set) failed(op string, d *item, err error) error {
	return problem.New(problem.Failed, op, "disk "+d.src.Drive.Name, "%w", err)
}
