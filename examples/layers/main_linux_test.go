package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
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

func TestLayers(t *testing.T) {
	var out strings.Builder
	if err := serve(&out); err != nil {
		t.Fatal(err)
	}
	var memory []byte
	for page := range pages {
		layer := byte('A')
		switch {
		case page%8 == 0:
			layer = 'C'
		case page%4 == 0:
			layer = 'B'
		}
		memory = append(memory, bytes.Repeat([]byte{layer}, os.Getpagesize())...)
	}
	for _, want := range []string{
		"layer 0  48 pages", "layer 1  8 pages", "layer 2  8 pages",
		fmt.Sprintf("memory   %x", sha256.Sum256(memory)),
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("printed:\n%swant %q", &out, want)
		}
	}
}
