package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

func TestMain(m *testing.M) { uffdtest.Main(m) }

func TestLazyslice(t *testing.T) {
	var out strings.Builder
	if err := run(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"request=00058254 at 3728256", "request=00065536 status=503"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing from\n%s", want, out.String())
		}
	}
}

// A damaged file is an error of the search, not a wrong result.
func TestDamagedFile(t *testing.T) {
	for name, damage := range map[string]func(c *chunked, file *os.File) error{
		"byte": func(c *chunked, file *os.File) error {
			_, err := file.WriteAt([]byte{0xff}, c.starts[2]-20)
			return err
		},
		"chunk too short": func(c *chunked, file *os.File) error { c.size += chunkSize / 2; return nil },
		"truncated":       func(c *chunked, file *os.File) error { return file.Truncate(c.starts[1] + 10) },
	} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			packed, err := pack(file, makeLog(chunkSize*3/2))
			if err == nil {
				err = damage(packed, file)
			}
			if err != nil {
				t.Fatal(err)
			}
			m, err := lazymem.New(source.FromReaderAt(packed, packed.size), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			var damaged *lazymem.Error
			if n, err := m.ReadAt(make([]byte, 10), chunkSize); !errors.As(err, &damaged) || damaged.Off != chunkSize {
				t.Errorf("ReadAt = %d, %v", n, err)
			}
			if n, err := m.ReadAt(make([]byte, 10), 0); n != 10 || err != nil {
				t.Errorf("ReadAt of what is whole = %d, %v", n, err)
			}
		})
	}
}
