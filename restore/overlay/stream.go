package overlay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// jobPrefix begins the names of the jobs that make overlays independent.
const jobPrefix = "ckagent-flatten-"

// pollEvery is how often QEMU is asked how far it is.
const pollEvery = 200 * time.Millisecond

// node is a block node as QEMU lists it.
type node struct {
	Name  string `json:"node-name"`
	Drv   string `json:"drv"`
	Image struct {
		Filename string `json:"filename"`
	} `json:"image"`
}

// Stream has a running QEMU copy into these overlays all that their chains hold and
// they do not, in the background, so that they need the store no longer. It returns
// when the jobs have begun; they need nobody to go on or to end.
func Stream(ctx context.Context, c *qmp.Client, paths []string, bytesPerSecond uint64) error {
	var nodes []node
	if err := c.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return fmt.Errorf("query-named-block-nodes: %w", err)
	}
	for i, path := range paths {
		at := slices.IndexFunc(nodes, func(n node) bool { return n.Drv == "qcow2" && n.Image.Filename == path })
		if at < 0 {
			return problem.New(problem.Failed, "flatten", path, "QEMU has no such node")
		}
		args := map[string]any{"job-id": fmt.Sprintf("%s%d", jobPrefix, i), "device": nodes[at].Name,
			"auto-finalize": true, "auto-dismiss": true}
		if bytesPerSecond > 0 {
			args["speed"] = bytesPerSecond
		}
		if err := c.Execute(ctx, "block-stream", args, nil); err != nil {
			return problem.New(problem.Failed, "flatten", path, "%w", err)
		}
	}
	return nil
}

// AwaitStreams returns when no job of Stream runs any more and none of the overlays
// has a backing file. onProgress, if not nil, is told how far they are.
func AwaitStreams(ctx context.Context, c *qmp.Client, paths []string, onProgress func(done, total uint64)) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		var jobs []struct {
			Device string `json:"device"`
			Offset uint64 `json:"offset"`
			Len    uint64 `json:"len"`
		}
		if err := c.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
			return fmt.Errorf("query-block-jobs: %w", err)
		}
		var done, total uint64
		running := false
		for _, j := range jobs {
			if strings.HasPrefix(j.Device, jobPrefix) {
				done, total, running = done+j.Offset, total+j.Len, true
			}
		}
		if !running {
			return flat(paths)
		}
		if onProgress != nil {
			onProgress(done, total)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return problem.New(problem.Cancelled, "flatten", strings.Join(paths, ", "), "%w", context.Cause(ctx)).
				WithHint("QEMU goes on by itself")
		}
	}
}

func flat(paths []string) error {
	var errs []error
	for _, path := range paths {
		h, err := qcow2.ReadHeader(path)
		if err == nil && h.Backing != "" {
			err = errors.New("the job ended before it was done: it still needs " + h.Backing)
		}
		if err != nil {
			errs = append(errs, problem.New(problem.Failed, "flatten", path, "%w", err))
		}
	}
	return errors.Join(errs...)
}
