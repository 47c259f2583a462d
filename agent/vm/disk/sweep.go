package disk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
)

// Swept says what Sweep took out.
type Swept struct {
	Jobs     []string `json:"jobs"`
	Filters  []string `json:"filters"`  // devices that were given back their medium
	Overlays []string `json:"overlays"` // images that were given what an overlay held
	Nodes    []string `json:"nodes"`
	Bitmaps  []string `json:"bitmaps"` // node/name
}

// Nothing reports that there was nothing to take out.
func (s *Swept) Nothing() bool {
	return len(s.Jobs)+len(s.Filters)+len(s.Overlays)+len(s.Nodes)+len(s.Bitmaps) == 0
}

// jobPoll is how often a cancelled job is looked at. A job is asked about and not
// listened for, because a guardian's connection hands out no events.
const jobPoll = 5 * time.Millisecond

// Sweep ends our jobs, gives devices back what they had, and removes our nodes, our
// descriptor sets and, with bitmaps, our bitmaps. What an overlay holds is committed to
// the image below it, which takes as long as it takes and does not end with ctx. The
// machine may run. It goes on after an error as far as makes sense and may be repeated.
func Sweep(ctx context.Context, q Monitor, bitmaps bool) (Swept, error) {
	s := Swept{Jobs: []string{}, Filters: []string{}, Overlays: []string{}, Nodes: []string{}, Bitmaps: []string{}}
	err := s.endJobs(ctx, q)
	if err != nil {
		return s, err // nodes in use cannot be removed
	}
	g, err := Read(ctx, q)
	if err != nil {
		return s, err
	}
	var errs []error
	if g.overlays() != nil {
		errs = append(errs, s.commitOverlays(ctx, q, g))
		if g, err = Read(ctx, q); err != nil {
			return s, errors.Join(append(errs, err)...)
		}
	}
	do := func(done *[]string, name, command string, args any) {
		if err := q.Execute(ctx, command, args, nil); alreadyGone(err) {
			// Somebody else was quicker: a guardian, or a release by hand.
		} else if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", command, name, err))
		} else {
			*done = append(*done, name)
		}
	}
	remove := func(node string) { do(&s.Nodes, node, "blockdev-del", map[string]string{"node-name": node}) }
	var ours []string
	for name := range g.Nodes {
		if Ours(name) {
			ours = append(ours, name)
		}
	}
	slices.Sort(ours)
	kind := func(prefix string) []string {
		var out []string
		for _, name := range ours {
			if strings.HasPrefix(name, Prefix+prefix) {
				out = append(out, name)
			}
		}
		return out
	}
	for _, n := range kind("snap-") {
		remove(n)
	}
	for _, d := range g.Drives {
		if strings.HasPrefix(d.Root, Prefix+"cbw-") {
			do(&s.Filters, d.QOMPath, "qom-set", map[string]string{"path": d.QOMPath, "property": "drive", "value": g.Nodes[d.Root].Child("file")})
		}
	}
	for _, k := range []string{"cbw-", "fleece-", "target-", "overlay-"} {
		for _, n := range kind(k) {
			if k != "overlay-" || g.Nodes[n].Child("backing") == "" { // else it was not committed, and serves the guest
				remove(n)
			}
		}
	}
	for _, n := range g.Nodes {
		for _, b := range n.Bitmaps {
			if !Ours(n.Name) && (b.Name == DeltaBitmap || bitmaps && OurBitmap(b.Name)) {
				do(&s.Bitmaps, n.Name+"/"+b.Name, "block-dirty-bitmap-remove", map[string]string{"node": n.Name, "name": b.Name})
			}
		}
	}
	stays := map[string]bool{}
	for _, name := range ours {
		stays[name] = !slices.Contains(s.Nodes, name)
	}
	errs = append(errs, dropFdsets(ctx, q, stays))
	return s, errors.Join(errs...)
}

// alreadyGone reports whether QEMU answers that there is no such node or bitmap.
func alreadyGone(err error) bool {
	var refused *qmp.Error
	return errors.As(err, &refused) && (refused.Class == "DeviceNotFound" ||
		strings.HasPrefix(refused.Desc, "Failed to find node") || strings.HasPrefix(refused.Desc, "Cannot find device") ||
		strings.HasPrefix(refused.Desc, "Dirty bitmap") && strings.HasSuffix(refused.Desc, "not found"))
}

// endJobs cancels our jobs and waits until they are gone.
func (s *Swept) endJobs(ctx context.Context, q Monitor) error {
	tick := time.NewTicker(jobPoll)
	defer tick.Stop()
	cancelled := map[string]bool{}
	for {
		jobs, err := ReadJobs(ctx, q)
		if err != nil {
			return err
		}
		left := 0
		for i := range jobs {
			j := &jobs[i]
			if !Ours(j.ID) {
				continue
			}
			left++
			switch {
			case j.Over() && isCommit(j.ID) && j.Error == "":
				if err := s.committed(ctx, q, j.ID); err != nil {
					return fmt.Errorf("end %s: %w", j.ID, err)
				}
				s.Jobs = append(s.Jobs, j.ID)
				left--
			case j.Over():
				if err := q.Execute(ctx, "job-dismiss", map[string]string{"id": j.ID}, nil); err != nil {
					return fmt.Errorf("job-dismiss %s: %w", j.ID, err)
				}
				s.Jobs = append(s.Jobs, j.ID)
				left--
			case !cancelled[j.ID]:
				// It may end by itself just now, which is as good.
				_ = q.Execute(ctx, "block-job-cancel", map[string]any{"device": j.ID, "force": true}, nil)
				cancelled[j.ID] = true
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("jobs of ours do not end: %w", context.Cause(ctx))
		}
	}
}

// dropFdsets takes back the descriptors of disks, and removes the files of overlays
// that nothing is read from any more. Nodes that stay keep theirs.
func dropFdsets(ctx context.Context, q Monitor, stays map[string]bool) error {
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := q.Execute(ctx, "query-fdsets", nil, &sets); err != nil {
		return fmt.Errorf("query-fdsets: %w", err)
	}
	var errs []error
	for _, s := range sets {
		if len(s.FDs) == 0 {
			continue
		}
		node, path, overlay := overlayOf(s.FDs[0].Opaque)
		if overlay && stays[node] || !overlay && s.FDs[0].Opaque != FdsetOpaque {
			continue
		}
		errs = append(errs, q.Execute(ctx, "remove-fd", map[string]int{"fdset-id": s.ID}, nil))
		if overlay {
			errs = append(errs, removeOverlay(path))
		}
	}
	return errors.Join(errs...)
}
