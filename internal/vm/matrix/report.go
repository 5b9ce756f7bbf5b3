package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/go-uffd/uffd/internal/vm"
)

// A run is what came out of one guest.
type run struct {
	guest   *guest
	machine *vm.Machine

	Release  string // uname -r, or "" if it did not boot
	PageSize int
	Features uint64
	Packages []*packageRun
}

// A packageRun is one package's tests on one guest.
type packageRun struct {
	Name    string // the package's path inside the module
	Elapsed time.Duration
	output
}

// fail adds a failure that is none of a single test's.
func (r *run) fail(name, reason string) {
	p := &packageRun{Name: name}
	p.output.test(name).Result = "FAIL"
	p.output.test(name).Log = strings.Split(reason, "\n")
	r.Packages = append(r.Packages, p)
}

func (r *run) count(result string) int {
	n := 0
	for _, p := range r.Packages {
		for _, t := range p.Tests {
			if t.Result == result {
				n++
			}
		}
	}
	return n
}

// name is short and tells guests apart.
func (r *run) name() string {
	s := r.guest.programArch() + " " + r.guest.kernel
	if r.guest.goarch != "" {
		s += " on " + r.guest.arch
	}
	if r.guest.pageSize != 0 {
		s += fmt.Sprintf(" %dK", r.guest.pageSize>>10)
	}
	if r.guest.cpu != "" {
		s += " " + r.guest.cpu
	}
	return s
}

// slowest names the packages that took the longest.
func (r *run) slowest() string {
	packages := slices.Clone(r.Packages)
	slices.SortStableFunc(packages, func(a, b *packageRun) int { return cmp.Compare(b.Elapsed, a.Elapsed) })
	var names []string
	for _, p := range packages[:min(3, len(packages))] {
		names = append(names, fmt.Sprintf("%s %v", p.Name, p.Elapsed.Round(time.Second)))
	}
	return strings.Join(names, ", ")
}

// hasWords reports whether the name has all the words: 6.1 is none of 6.12's.
func (r *run) hasWords(words string) bool {
	name := strings.Fields(r.name())
	for word := range strings.FieldsSeq(words) {
		if !slices.Contains(name, word) {
			return false
		}
	}
	return true
}

// writeTable writes the results as Markdown.
func writeTable(w io.Writer, runs []*run) {
	fmt.Fprintln(w, "| kernel | architecture | pages | `UFFDIO_API` offers | passed | skipped | failed |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|")
	for _, r := range runs {
		arch := r.guest.programArch()
		if r.guest.goarch != "" {
			arch += " on " + r.guest.arch
		}
		if r.guest.cpu != "" {
			arch += ", " + r.guest.cpu
		}
		release, pages, features := r.guest.kernel+" (did not boot)", "", ""
		if r.Release != "" {
			release, pages, features = r.Release, fmt.Sprintf("%dK", r.PageSize>>10), fmt.Sprintf("%#x", r.Features)
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %d | %d | %d |\n", release, arch, pages, features,
			r.count("PASS"), r.count("SKIP"), r.count("FAIL"))
	}
}

// writeSkips writes which tests were skipped, why and where, those with the
// same reason and the same places together.
func writeSkips(w io.Writer, runs []*run) {
	type skip struct{ reason, test string }
	where := make(map[skip][]string)
	for _, r := range runs {
		for _, p := range r.Packages {
			for _, t := range p.Tests {
				if t.Result == "SKIP" {
					s := skip{t.reason(), p.Name + " " + t.Name}
					where[s] = append(where[s], r.name())
				}
			}
		}
	}
	type group struct{ reason, guests string }
	tests := make(map[group][]string)
	for s, guests := range where {
		g := group{s.reason, strings.Join(guests, ", ")}
		if len(guests) == len(runs) {
			g.guests = "all"
		}
		tests[g] = append(tests[g], "`"+s.test+"`")
	}
	groups := make([]group, 0, len(tests))
	for g := range tests {
		groups = append(groups, g)
	}
	slices.SortFunc(groups, func(a, b group) int {
		return cmp.Or(strings.Compare(a.reason, b.reason), strings.Compare(a.guests, b.guests))
	})
	for _, g := range groups {
		slices.Sort(tests[g])
		fmt.Fprintf(w, "- %s (%s): %s\n", g.reason, g.guests, strings.Join(tests[g], ", "))
	}
}

// writeFailures writes what failed and what it said.
func writeFailures(w io.Writer, r *run) {
	for _, p := range r.Packages {
		for _, t := range p.Tests {
			if t.Result == "FAIL" {
				fmt.Fprintf(w, "FAIL %s: %s %s\n", r.name(), p.Name, t.Name)
				const enough = 200
				for i, line := range t.Log {
					if i < enough || i == len(t.Log)-1 {
						fmt.Fprintf(w, "    %s\n", line)
					} else if i == enough {
						fmt.Fprintln(w, "    ...")
					}
				}
			}
		}
	}
}

// writeDocument writes docs/kernels.md.
func writeDocument(w io.Writer, args []string, runs []*run) {
	fmt.Fprint(w, `# Kernels

Results of the tests (with -short) on real kernels, as root in a virtual machine, one boot for each line. Every test
asserts what the kernel offers; the mask is that of `+"`UFFDIO_API`"+`. Made by

    go run ./internal/vm/matrix `+strings.Join(args, " ")+`

`)
	writeTable(w, runs)
	fmt.Fprint(w, "\n## Skipped tests\n\n")
	writeSkips(w, runs)
}
