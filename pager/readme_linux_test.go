package pager_test

import (
	"context"
	"errors"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// serveFile fills memory of another process with what is in a file, page by page
// as the process touches it, until the process is gone. f is the userfaultfd that
// the process has registered the memory with, and sent here.
func serveFile(ctx context.Context, f *uffd.File, memory uffd.Range, name string) error {
	file, err := source.OpenFile(name)
	if err != nil {
		return err
	}
	defer file.Close()
	p := &pager.Pager{ErrorHook: func(_ *pager.Client, err error) { log.Print(err) }}
	c, err := p.Attach(f, pager.Region{Range: memory, Source: file})
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Serve(ctx)
}

// The first program of README.md is the one above, and works.
func TestREADME(t *testing.T) {
	ours, err := os.ReadFile("readme_linux_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(ours), "// serveFile fills")
	program, _, ok := strings.Cut(rest, "\n}\n")
	if !ok {
		t.Fatal("no serveFile")
	}
	program = "// serveFile fills" + program + "\n}\n"
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), program) {
		t.Errorf("README.md has another program than\n%s", program)
	}

	const pages = 20
	content := image(uffdtest.Anon, pages)
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, content[:len(content)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	over := make(chan error, 1)
	go func() { over <- serveFile(context.Background(), f, mem.Range, name) }()
	for _, i := range []int{7, 0, 19, 6} {
		if v := proc.Load(mem.Page(i).Start).Value(); v != uint64(i+1) {
			t.Errorf("page %d begins with %d, want %d", i, v, i+1)
		}
	}
	if v := proc.Load(mem.End() - 1).Value(); v != 0 {
		t.Errorf("behind the end of the file there is %d", v)
	}
	proc.Kill()
	if err := <-over; err != nil && !errors.Is(err, uffd.ErrGone) {
		t.Errorf("after the process: %v", err)
	}
}
