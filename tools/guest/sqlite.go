package guest

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
)

// SQLite returns the Linux guest with a database server (sqld), which runs on the
// guest's disk when the command line has GD_SQL=PORT.
func SQLite(ctx context.Context) (Image, error) {
	image, err := Linux(ctx)
	if err != nil {
		return Image{}, err
	}
	library, err := sqliteLibrary(ctx)
	if err != nil {
		return Image{}, err
	}
	src, names, err := sourceFiles("sqld")
	if err != nil {
		return Image{}, err
	}
	parts := [][]byte{[]byte(recipe), []byte(filepath.Base(filepath.Dir(image.Initrd))), []byte(filepath.Base(library))}
	for _, n := range names {
		parts = append(parts, []byte(n), src[n])
	}
	dir, err := artifact(ctx, "sqlite", stamp(parts...), func(dir string) error {
		sqld, err := compile(ctx, src, names, "sqld", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-s",
			"-I", filepath.Join(library, "include"), "-L", library, "-lsqlite3", "-lm")
		if err != nil {
			return err
		}
		initrd, err := os.ReadFile(image.Initrd)
		if err != nil {
			return err
		}
		// The kernel unpacks one archive after the other (early-userspace/
		// buffer-format.rst), each of which begins at a multiple of four bytes.
		initrd = append(initrd, bytes.Repeat([]byte{0}, -len(initrd)&3)...)
		more := cpio([]file{{name: "bin/sqld", mode: 0o755, data: sqld}})
		return os.WriteFile(filepath.Join(dir, "initrd"), append(initrd, more...), 0o644)
	})
	if err != nil {
		return Image{}, err
	}
	image.Initrd = filepath.Join(dir, "initrd")
	return image, nil
}

// sqliteLibrary is an artifact with libsqlite3.a and include/sqlite3.h.
func sqliteLibrary(ctx context.Context) (string, error) {
	r, err := currentRelease()
	if err != nil {
		return "", err
	}
	return artifact(ctx, "libsqlite", stamp([]byte(recipe), []byte(r.codename)), func(dir string) error {
		a, err := openApt()
		if err != nil {
			return err
		}
		root := filepath.Join(dir, "root")
		if err := a.unpack(ctx, root, "libsqlite3-dev"); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(dir, "include"), 0o755); err != nil {
			return err
		}
		for from, to := range map[string]string{
			"usr/lib/x86_64-linux-gnu/libsqlite3.a": "libsqlite3.a",
			"usr/include/sqlite3.h":                 "include/sqlite3.h",
		} {
			if err := os.Rename(filepath.Join(root, from), filepath.Join(dir, to)); err != nil {
				return err
			}
		}
		return os.RemoveAll(root)
	})
}
