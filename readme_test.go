package uffd

import (
	"flag"
	"fmt"
	"math/bits"
	"os"
	"strings"
	"testing"
)

//go:generate go test -run TestREADME -update

var update = flag.Bool("update", false, "write generated parts of README.md")

const (
	tableBegin = "<!-- features.go: go generate -->\n"
	tableEnd   = "<!-- end -->\n"
)

// TestREADME compares the kernel table in README.md with features.go.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(readme), tableBegin)
	table, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatalf("README.md has no table between %q and %q", tableBegin, tableEnd)
	}
	want := kernelTable()
	if table == want {
		return
	}
	if !*update {
		t.Fatalf("README.md's table is stale: run go generate; it should be\n%s", want)
	}
	if err := os.WriteFile("README.md", []byte(before+tableBegin+want+tableEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestHandlerIsTheSame compares the handler in the package's doc with the one that
// TestServe runs.
func TestHandlerIsTheSame(t *testing.T) {
	example, err := os.ReadFile("example_linux_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(example), "// serve fills")
	handler, _, ok := strings.Cut(rest, "\n}\n")
	if !ok {
		t.Fatal("no handler in example_linux_test.go")
	}
	handler = "// serve fills" + handler + "\n}"
	doc, err := os.ReadFile("uffd.go")
	if err != nil {
		t.Fatal(err)
	}
	if want := "//\t" + strings.ReplaceAll(handler, "\n", "\n//\t") + "\n"; !strings.Contains(string(doc), want) {
		t.Errorf("the package's doc has another handler than\n%s", handler)
	}
}

// kernelTable lists what each kernel brought.
func kernelTable() string {
	var kernels []kernel
	rows := make(map[kernel][]string) // by kernel: features, operations, modes
	add := func(k kernel, column int, name string) {
		if rows[k] == nil {
			rows[k] = make([]string, 3)
			i := 0
			for i < len(kernels) && k.newer(kernels[i]) {
				i++
			}
			kernels = append(kernels[:i], append([]kernel{k}, kernels[i:]...)...)
		}
		if rows[k][column] != "" {
			rows[k][column] += ", "
		}
		rows[k][column] += "`" + name + "`"
	}
	for _, f := range sets[featurePrefix] {
		add(f.since, 0, f.name)
	}
	for bit := range 64 {
		for _, f := range sets[ioctlPrefix] {
			if bits.TrailingZeros64(f.bit) == bit {
				add(f.since, 1, f.name)
			}
		}
	}
	for _, f := range sets[registerPrefix] {
		add(f.since, 2, f.name)
	}
	var s strings.Builder
	s.WriteString("| Linux | features | operations | register modes |\n|---|---|---|---|\n")
	for _, k := range kernels {
		fmt.Fprintf(&s, "| %v | %s |\n", k, strings.Join(rows[k], " | "))
	}
	return s.String()
}
