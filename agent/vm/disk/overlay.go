package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	commitPoll = 5 * time.Millisecond
	// commitStall is how long nothing may be copied before a commit is given up. The
	// overlay stays then, and the guest goes on with it.
	commitStall = 30 * time.Second
	// commitMost bounds a commit to a disk that its guest overwrites faster than it is
	// committed.
	commitMost = 30 * time.Minute
)

// overlays are the nodes of overlays, those that a drive was switched to and those
// that were only prepared.
func (g *Graph) overlays() []string {
	var out []string
	for name := range g.Nodes {
		if strings.HasPrefix(name, Prefix+"overlay-") && Ours(name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// rootOver is the top node of the drive that a node lies in, or the node itself if it
// is in none.
func (g *Graph) rootOver(name string) string {
	for _, d := range g.Drives {
		if slices.ContainsFunc(g.Below(d.Root), func(n *Node) bool { return n.Name == name }) {
			return d.Root
		}
	}
	return name
}

// commitOverlays has QEMU write what overlays hold to the images below them, and give
// the drives those images back.
func (s *Swept) commitOverlays(ctx context.Context, q Monitor, g *Graph) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), commitMost, errors.New("the guest writes faster than its overlay is committed"))
	defer cancel()
	var errs []error
	for _, name := range g.overlays() {
		base := g.Nodes[name].Child("backing")
		if base == "" {
			continue // prepared, and never switched to
		}
		job := Prefix + "commit-" + strings.TrimPrefix(name, Prefix+"overlay-")
		err := q.Execute(ctx, "block-commit", map[string]any{"job-id": job, "device": g.rootOver(name), "top-node": name, "base-node": base,
			"auto-dismiss": false, "on-error": "report"}, nil)
		if err == nil {
			err = awaitCommit(ctx, q, job)
		}
		if err == nil {
			err = s.committed(ctx, q, job)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("commit %s to %s: %w", name, g.Nodes[base].Path(), err))
			continue
		}
		s.Overlays = append(s.Overlays, g.Nodes[base].Path())
	}
	return errors.Join(errs...)
}

// committed ends a commit that has switched its drive back. The overlay goes before the
// job does, since nothing but the job tells that what the overlay holds is old: to
// commit it once more would undo what the guest has written since.
func (s *Swept) committed(ctx context.Context, q Monitor, job string) error {
	node := Prefix + "overlay-" + strings.TrimPrefix(job, Prefix+"commit-")
	if err := q.Execute(ctx, "blockdev-del", map[string]string{"node-name": node}, nil); err == nil {
		s.Nodes = append(s.Nodes, node)
	} else if !alreadyGone(err) {
		return err
	}
	return q.Execute(ctx, "job-dismiss", map[string]string{"id": job}, nil)
}

// isCommit reports whether a job is the commit of an overlay.
func isCommit(id string) bool { return strings.HasPrefix(id, Prefix+"commit-") && Ours(id) }

// awaitCommit waits until a job has written everything once, tells it to switch the
// drive over, and waits for its end. A job that has succeeded is left to be dismissed.
func awaitCommit(ctx context.Context, q Monitor, id string) error {
	tick := time.NewTicker(commitPoll)
	defer tick.Stop()
	completed := false
	var last uint64
	moved := time.Now()
	for {
		jobs, err := ReadJobs(ctx, q)
		if err != nil {
			return err
		}
		k := slices.IndexFunc(jobs, func(j Job) bool { return j.ID == id })
		if k < 0 {
			return errors.New("its job was taken away by somebody")
		}
		j := &jobs[k]
		switch {
		case j.Over() && j.Error == "":
			return nil
		case j.Over():
			return errors.Join(errors.New(j.Error), q.Execute(ctx, "job-dismiss", map[string]string{"id": id}, nil))
		case j.Status == "ready" && !completed:
			if err := q.Execute(ctx, "job-complete", map[string]string{"id": id}, nil); err != nil {
				return err
			}
			completed, moved = true, time.Now()
		case j.Progress != last:
			last, moved = j.Progress, time.Now()
		case time.Since(moved) > commitStall:
			return fmt.Errorf("nothing was written for %v", commitStall)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// removeOverlay removes the file of an overlay. Its path was QEMU's to keep, so nothing
// is removed that does not look like one of ours.
func removeOverlay(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !IsOverlayName(path) || !st.Mode().IsRegular() {
		return fmt.Errorf("%s was not made by a checkpoint and stays", path)
	}
	return os.Remove(path)
}
