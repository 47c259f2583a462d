package proving

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
)

// Path is a way by which a guest's writes reach its RAM, and what came of its trial.
type Path struct {
	Accel   string  `json:"accel"`
	RAM     string  `json:"ram"` // anonymous, shared
	Outcome Outcome `json:"outcome"`
	Detail  string  `json:"detail"`
	Pages   uint64  `json:"pages"`   // captured in the kernel, and compared
	TookNS  int64   `json:"took_ns"` // all of its trials
}

// trust returns nil if the engine can be trusted on this path, else why not.
func (p *Path) trust() error {
	switch p.Outcome {
	case Proved:
		return nil
	case Refuted:
		return fmt.Errorf("its test on this host failed for accelerator %s and %s RAM: %s", p.Accel, p.RAM, p.Detail)
	}
	return fmt.Errorf("%w: for accelerator %s and %s RAM the host had not the time for it: %s", capture.ErrUntried, p.Accel, p.RAM, p.Detail)
}

const (
	schema = "ckagent.proving/v2"
	// recordDir is where the answers stay until the next boot.
	recordDir = "/run/ckagent/proving"
	// maxFiles bounds what is left there by builds that come and go: those that nobody
	// asked for longest are removed.
	maxFiles = 64
)

// record is where the answer of a path is kept, for this boot and for one build.
type record struct {
	file         string // of the answer
	boot, binary string
}

// written is the file's content.
type written struct {
	Schema string `json:"schema"`
	BootID string `json:"boot_id"`
	Binary string `json:"binary"` // which one was tried
	Path
}

// newRecord has one file for each binary: two of them may be at work on one host, during an
// upgrade for instance.
func newRecord(dir, path, accel, ram string) (*record, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	binary, err := identity(path)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(binary))
	return &record{file: filepath.Join(dir, fmt.Sprintf("%x-%s-%s.json", sum[:8], accel, ram)),
		boot: strings.TrimSpace(string(boot)), binary: binary}, nil
}

func (b *record) lock() string { return strings.TrimSuffix(b.file, ".json") + ".lock" }

// read returns what is known; nil: nothing is.
func (b *record) read() *Path {
	text, err := os.ReadFile(b.file)
	if err != nil {
		return nil
	}
	var w written
	if json.Unmarshal(text, &w) != nil || w.Schema != schema || w.BootID != b.boot || w.Binary != b.binary {
		return nil
	}
	now := time.Now()
	_ = os.Chtimes(b.file, now, now) // it is asked for: not to be swept
	return &w.Path
}

// write replaces the file in one step.
func (b *record) write(p *Path) error {
	text, err := json.Marshal(written{schema, b.boot, b.binary, *p})
	if err != nil {
		return err
	}
	dir := filepath.Dir(b.file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), b.file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return sweep(dir)
}

// sweep removes the oldest files beyond maxFiles.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	type aged struct {
		path string
		at   time.Time
	}
	var files []aged
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // else it has gone
			files = append(files, aged{filepath.Join(dir, e.Name()), info.ModTime()})
		}
	}
	slices.SortFunc(files, func(a, b aged) int { return b.at.Compare(a.at) })
	var errs []error
	for _, f := range files[min(maxFiles, len(files)):] {
		if err := os.Remove(f.path); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// identity names a binary by what it was built from; copies have the same name.
func identity(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("our own binary %s: %w", path, err)
	}
	defer f.Close()
	s := f.Section(".note.go.buildid")
	if s == nil {
		return "", fmt.Errorf("our own binary %s has no build id", path)
	}
	b, err := s.Data()
	if err != nil {
		return "", fmt.Errorf("our own binary %s: build id: %w", path, err)
	}
	return hex.EncodeToString(b), nil
}
