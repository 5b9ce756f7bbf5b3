package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	if twin.Second() {
		main()
		os.Exit(0)
	}
	uffdtest.Main(m)
}

func TestManpage(t *testing.T) {
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := handle(2, out); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	size := os.Getpagesize()
	for want, n := range map[string]int{
		fmt.Sprintf("(Copy returned %d)", size): 2,
		"in the second process: A":              size / 1024,
		"in the second process: B":              size / 1024,
	} {
		if got := strings.Count(string(text), want); got != n {
			t.Errorf("%q is printed %d times, want %d:\n%s", want, got, n, text)
		}
	}
}
