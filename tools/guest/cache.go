package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// CacheDir is where artifacts are kept: CKAGENT_CACHE, else .cache in the root
// of the module around the working directory, else ckagent in the user's cache
// directory. It is created if it is not there.
func CacheDir() (string, error) {
	dir := os.Getenv("CKAGENT_CACHE")
	if dir == "" {
		dir = moduleCache()
	}
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", problem.New(problem.Failed, "find a cache directory", "", "%w", err).
				WithHint("set CKAGENT_CACHE to a directory")
		}
		dir = filepath.Join(user, "ckagent")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", problem.New(problem.Failed, "create cache directory", dir, "%w", err)
	}
	return dir, nil
}

// moduleCache is .cache beside the nearest go.mod upwards of the working
// directory, "" if there is none.
func moduleCache() string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".cache")
		}
		up := filepath.Dir(dir)
		if up == dir {
			return ""
		}
		dir = up
	}
}

// stamp names a content: the first 12 hex digits of the SHA-256 of the parts.
func stamp(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// artifact returns the directory <cache>/<name>-<stamp>, and calls build to
// fill it if it is not there. build gets an empty directory, which becomes the
// artifact by a rename when build returns nil.
func artifact(ctx context.Context, name, stamp string, build func(dir string) error) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	final := filepath.Join(cache, name+"-"+stamp)
	if isDir(final) { // complete by construction: no lock needed
		return final, nil
	}
	unlock, err := lock(ctx, filepath.Join(cache, "."+name+".lock"))
	if err != nil {
		return "", problem.New(problem.Failed, "lock the cache for", name, "%w", err)
	}
	defer unlock()
	if isDir(final) {
		return final, nil
	}
	// Whoever held the lock before and died left this: the lock says it is dead.
	work := filepath.Join(cache, "."+name+".building")
	if err := os.RemoveAll(work); err != nil {
		return "", err
	}
	if err := os.Mkdir(work, 0o755); err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if err := build(work); err != nil {
		return "", err
	}
	if err := os.Rename(work, final); err != nil {
		return "", err
	}
	return final, nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// lock takes an exclusive flock and returns what gives it back. The kernel has
// no flock with a deadline, so waiting is done by asking again.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
