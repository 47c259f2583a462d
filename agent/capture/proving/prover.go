package proving

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/flock"
	"github.com/ckagent/ckagent/agent/selfexe"
)

// Accelerators with a trial. ByAuto is the one under which a checkpoint takes the engine
// without being asked to.
const (
	ByAuto = "tcg"
	KVM    = "kvm"
)

var kindNames = map[source.Kind]string{source.Anonymous: "anonymous", source.Shared: "shared", source.PrivateFile: "private file"}

// kinds of RAM that have a trial.
var kinds = []source.Kind{source.Anonymous, source.Shared}

// effort is what one trial may take.
type effort struct {
	patience time.Duration
	nice     int // of the subject
}

// writing is how long the subject may take to write enough.
func (e effort) writing() time.Duration { return e.patience / 5 }

// stopping is how long its threads may take to stand still: each has to get a processor
// for it.
func (e effort) stopping() time.Duration { return e.patience / 3 }

// efforts are made one after the other until one says something. A trial takes less than
// a second where there is time. The first ones keep behind every guest; since a
// host may be busy for ever, the last does not.
var efforts = []effort{{10 * time.Second, 19}, {30 * time.Second, 10}, {60 * time.Second, 0}}

// turnPatience is for another process that makes the same trials.
const turnPatience = 2 * time.Minute

// Prover knows, or finds out, what can be trusted. It is a capture.Proofs.
type Prover struct {
	helper  []string
	dir     string
	efforts []effort
	try     func(ctx context.Context, helper []string, w way, e effort) (byRing uint64, err error)
}

// New makes one for the binary that the command line helper leads to; nil: this very one.
func New(helper []string) *Prover {
	return &Prover{helper: selfexe.Or(helper), dir: recordDir, efforts: efforts, try: trial}
}

// Known returns nil if the engine can be trusted for an accelerator and a kind of RAM, else
// why not: capture.ErrUntried if that is not known. It does not wait.
func (p *Prover) Known(accel string, ram source.Kind) error {
	b, err := p.open(accel, ram)
	if err != nil {
		return err
	}
	if known := b.read(); known != nil {
		return known.trust()
	}
	return fmt.Errorf("%w, for accelerator %s and %s RAM", capture.ErrUntried, accel, kindNames[ram])
}

// Prove is Known of a path that is tried if it was not. A trial that came to no end is
// capture.ErrUntried.
func (p *Prover) Prove(ctx context.Context, accel string, ram source.Kind) error {
	path, err := p.settle(ctx, accel, ram)
	if err != nil {
		return err
	}
	return path.trust()
}

// All says what is known of every path of the accelerators, or of all if none is named,
// and tries those that were not tried.
func (p *Prover) All(ctx context.Context, accels ...string) (all []Path, err error) {
	if len(accels) == 0 {
		accels = []string{ByAuto, KVM}
	}
	for _, accel := range accels {
		for _, kind := range kinds {
			path, err := p.settle(ctx, accel, kind)
			if err != nil {
				return nil, err
			}
			all = append(all, *path)
		}
	}
	return all, nil
}

// open is where the path's answer is kept.
func (p *Prover) open(accel string, ram source.Kind) (*record, error) {
	if accel != ByAuto && accel != KVM || !slices.Contains(kinds, ram) {
		return nil, fmt.Errorf("it has no test for accelerator %s and %s RAM", accel, kindNames[ram])
	}
	return newRecord(p.dir, p.helper[0], accel, kindNames[ram])
}

// settle returns what is known of a path, or makes the trial.
func (p *Prover) settle(ctx context.Context, accel string, ram source.Kind) (*Path, error) {
	b, err := p.open(accel, ram)
	if err != nil {
		return nil, err
	}
	if known := b.read(); known != nil {
		return known, nil
	}
	// Those who wait for it need no trial of their own.
	lock, err := b.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	defer os.Remove(lock.Name()) // while it is held; who waits for it looks again
	if known := b.read(); known != nil {
		return known, nil
	}
	path, err := p.make(ctx, wayOf(accel, ram))
	if err == nil && path.Outcome != Inconclusive {
		_ = b.write(path) // without it the next one tries again
	}
	return path, err
}

// make makes trials until one says something, or there were enough. An error is ctx's.
func (p *Prover) make(ctx context.Context, w way) (*Path, error) {
	path := &Path{Accel: w.accel, RAM: kindNames[w.kind], Outcome: Inconclusive}
	begin := time.Now()
	var seen trials
	for _, e := range p.efforts {
		pages, err := p.once(ctx, w, e)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		path.Outcome, path.Pages = seen.add(find(err)), pages
		path.Detail = fmt.Sprintf("%d pages copied in the kernel before they were written, all right", pages)
		if err != nil {
			path.Detail = err.Error()
		}
		if path.Outcome != Inconclusive {
			break
		}
	}
	path.TookNS = time.Since(begin).Nanoseconds()
	return path, nil
}

func (p *Prover) once(ctx context.Context, w way, e effort) (pages uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.patience)
	defer cancel()
	pages, err = p.try(ctx, p.helper, w, e)
	if err != nil && ctx.Err() != nil {
		err = errors.Join(err, ctx.Err()) // whatever it was that did not go on
	}
	return pages, err
}

// turn waits until no other process tries the path. Closing the file ends the lock.
func (b *record) turn(ctx context.Context) (*os.File, error) {
	limited, cancel := context.WithTimeout(ctx, turnPatience)
	defer cancel()
	f, err := flock.Wait(limited, b.lock(), nil)
	if ctx.Err() != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	if held, ok := errors.AsType[*flock.Held](err); ok {
		return nil, fmt.Errorf("%w: another process has been at it for %v (%w)", capture.ErrUntried, turnPatience, held)
	}
	return f, err
}
