package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/track"
)

func TestMain(m *testing.M) {
	if twin.Second() {
		main()
		os.Exit(0)
	}
	uffdtest.Main(m)
}

func TestSnapshot(t *testing.T) {
	uffdtest.Require(t, track.SnapshotFeatures)
	path := filepath.Join(t.TempDir(), "memory")
	var out strings.Builder
	if err := snapshot(path, &out); err != nil {
		t.Fatal(err)
	}
	var size, last uint64
	if n, _ := fmt.Sscanf(out.String(), "%d bytes as of number %d;", &size, &last); n != 2 || size != uint64(pages*os.Getpagesize()) {
		t.Errorf("printed %q", &out)
	}
	file, err := os.ReadFile(path)
	if err != nil || uint64(len(file)) != size {
		t.Fatalf("the file has %d bytes, %v; want %d", len(file), err, size)
	}
	if n, err := image(file).check(); n != last || err != nil {
		t.Errorf("the file is of number %d, %v; want %d", n, err, last)
	}
	// The check notices a number that came later.
	if last > 0 {
		file[page(last)*os.Getpagesize()] ^= 1
		if _, err := image(file).check(); err == nil {
			t.Error("a changed byte goes unnoticed")
		}
	}
}
