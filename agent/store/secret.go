package store

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// secretName is the file of the secret that the keys of all tags come from. It stays in
// its store: without it nothing is lost but the chance to continue a chain.
const secretName = "secret"

// TagKey is the key of a scope in this store. The first call makes the store's secret.
func (s *Store) TagKey(ctx context.Context, scope string) (*image.TagKey, error) {
	const op = "read secret"
	path := filepath.Join(s.dir, secretName)
	secret, err := s.readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.prepare(); err != nil {
			return nil, err
		}
		err = s.locked(ctx, op, func() error {
			if secret, err = s.readSecret(path); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			secret = make([]byte, image.TagSecretBytes)
			_, _ = rand.Read(secret) // never fails: it would end the process
			if err := s.replaceFile(path, secret); err != nil {
				return err
			}
			return s.fs.SyncDir(s.dir)
		})
	}
	if err != nil {
		return nil, fsys.Problem(op, path, err)
	}
	key, err := image.NewTagKey(secret, scope)
	if err != nil {
		return nil, problem.New(problem.Integrity, op, path, "%w", err).
			WithHint("remove the file: a new one is made, and the next checkpoints are full ones")
	}
	return key, nil
}

func (s *Store) readSecret(path string) ([]byte, error) {
	return fsys.ReadFileLimit(s.fs, path, 4096)
}
