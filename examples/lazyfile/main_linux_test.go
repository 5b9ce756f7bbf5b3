package main

import (
	"crypto/sha256"
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

func TestLazyfile(t *testing.T) {
	content := make([]byte, 10*os.Getpagesize()+1) // the last page is cut short
	for i := range content {
		content[i] = byte(i / 100)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := serve(path, &out); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	if strings.Count(out.String(), sum) != 2 || !strings.Contains(out.String(), fmt.Sprintf("%d bytes", len(content))) {
		t.Errorf("the file's hash is %s; printed:\n%s", sum, &out)
	}
	for _, path := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none"), "/dev/null"} {
		if err := serve(path, &out); err == nil {
			t.Errorf("%s was served", path)
		}
	}
}
