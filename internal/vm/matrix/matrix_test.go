package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/vm"
	"github.com/go-uffd/uffd/internal/vm/job"
)

// Every guest of the table has to be one that the runner knows, and only one.
func TestTable(t *testing.T) {
	names := make(map[string]bool)
	short := 0
	for i := range guests {
		g := &guests[i]
		if _, err := vm.FindMachine(g.arch, g.pageSize); err != nil {
			t.Error(err)
		}
		if g.mask == 0 {
			t.Errorf("%s %s offers nothing", g.arch, g.kernel)
		}
		name := (&run{guest: g}).name()
		if names[name] {
			t.Errorf("%s is there twice", name)
		}
		names[name] = true
		if g.short {
			short++
		}
	}
	if short == 0 || short == len(guests) {
		t.Errorf("the short tier has %d of %d guests", short, len(guests))
	}
}

const stream = "\x16=== RUN   TestA\n" +
	"    a_test.go:7: mask 0x1ff\n" +
	"\x16--- PASS: TestA (0.01s)\n" +
	"\x16=== RUN   TestB\n" +
	"\x16=== RUN   TestB/x_y\n" +
	"dots...\x16=== PAUSE TestB/x_y\n" +
	"\x16=== RUN   TestB/z\n" +
	"    b_test.go:9: helper says so\n" +
	"    b_test.go:10: missing: POISON (Linux 6.6)\n" +
	"\x16--- SKIP: TestB/z (0.00s)\n" +
	"\x16=== CONT  TestB/x_y\n" +
	"    b_test.go:11: wrong:\n        byte 3\n" +
	"\x16=== NAME  \n" +
	"not of a test\n" +
	"    \x16--- FAIL: TestB/x_y (0.02s)\n" +
	"\x16--- FAIL: TestB (0.02s)\n" +
	"\x16=== RUN   TestC\n" +
	"--- PASS: TestC is what a test printed\n" +
	"\x16--- SKIP: TestC (0.00s)\n" +
	"\x16FAIL\n"

func results(o *output) string {
	var s []string
	for _, t := range o.Tests {
		s = append(s, t.Name+" "+t.Result)
	}
	return strings.Join(s, ", ")
}

func TestOutput(t *testing.T) {
	const want = "TestA PASS, TestB FAIL, TestB/x_y FAIL, TestB/z SKIP, TestC FAIL"
	for _, size := range []int{1, 7, len(stream)} { // however it is cut to pieces
		var o output
		for piece := range slices.Chunk([]byte(stream), size) {
			o.Write(piece)
		}
		o.finish(true, "exit status 1")
		if got := results(&o); got != want {
			t.Errorf("in pieces of %d: %s, want %s", size, got, want)
		}
		if got, want := o.byName["TestB/z"].reason(), "missing: POISON (Linux 6.6)"; got != want {
			t.Errorf("reason %q, want %q", got, want)
		}
		log := strings.Join(o.byName["TestB/x_y"].Log, "|")
		if want := "dots...|    b_test.go:11: wrong:|        byte 3"; log != want {
			t.Errorf("log %q, want %q", log, want)
		}
	}
}

func TestOutputFinish(t *testing.T) {
	for _, test := range []struct {
		name   string
		stream string
		failed bool
		want   string
	}{
		{"well", "\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n", false, "TestA PASS"},
		{"crash in a test", "\x16=== RUN   TestA\nfatal error: x\n", true, "TestA FAIL"},
		{"crash between tests", "\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n", true, "TestA PASS, (program) FAIL"},
		{"crash before the first", "panic: init", true, "(program) FAIL"},
		{"skip without a reason", "\x16=== RUN   TestA\n\x16--- SKIP: TestA (0.00s)\n", false, "TestA FAIL"},
		{"crash after a failure", "\x16=== RUN   TestA\n\x16--- FAIL: TestA (0.00s)\npanic: x\n", true, "TestA FAIL"},
		{"hang after a failure", "\x16=== RUN   TestA\n\x16--- FAIL: TestA (0.00s)\n\x16=== RUN   TestB\n\x16=== RUN   TestB/x\npanic: x\n", true, "TestA FAIL, TestB FAIL, TestB/x FAIL"},
		{"exit in a test", "\x16=== RUN   TestA\n", false, "TestA FAIL"},
	} {
		var o output
		o.Write([]byte(test.stream))
		o.finish(test.failed, "exit status 2")
		if got := results(&o); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

func TestExit(t *testing.T) {
	const pass = "\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n"
	skip := func(reason string) string {
		return "\x16=== RUN   TestA\n    a_test.go:1: " + reason + "\n\x16--- SKIP: TestA (0.00s)\n"
	}
	for _, test := range []struct {
		name   string
		stream string
		exit   job.Exit
		root   bool
		want   string
		says   string
	}{
		{"well", pass, job.Exit{}, true, "TestA PASS", ""},
		{"status", pass, job.Exit{Code: 1}, true, "TestA PASS, (program) FAIL", "exit status 1"},
		{"signal", pass, job.Exit{Code: 128 + 11}, true, "TestA PASS, (program) FAIL", "exit status 139"},
		{"time limit, and no status", pass, job.Exit{TimedOut: true}, true, "TestA PASS, (program) FAIL", "past its time limit"},
		{"hang", "\x16=== RUN   TestA\n", job.Exit{Code: 2, TimedOut: true}, true, "TestA FAIL", "past its time limit"},
		{"skipped", skip("missing: kernel feature MOVE (Linux 6.8)"), job.Exit{}, true, "TestA SKIP", ""},
		{"root skips for root", skip("missing: root"), job.Exit{}, true, "TestA FAIL", "lack of what root has"},
		{"root skips for permission", skip("missing: permission to x"), job.Exit{}, true, "TestA FAIL", "lack of what root has"},
		{"another user", skip("missing: root"), job.Exit{}, false, "TestA SKIP", ""},
	} {
		var p packageRun
		p.Write([]byte(test.stream))
		p.exit(&test.exit, test.root)
		if got := results(&p.output); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
		if log := strings.Join(p.Tests[len(p.Tests)-1].Log, "\n"); !strings.Contains(log, test.says) {
			t.Errorf("%s: log %q does not say %q", test.name, log, test.says)
		}
	}
}

func TestReport(t *testing.T) {
	parse := func(name string, g guest, release string) *run {
		r := &run{guest: &g, Release: release, PageSize: 4096, Features: g.mask}
		p := &packageRun{Name: name}
		p.Write([]byte(stream))
		r.Packages = append(r.Packages, p)
		return r
	}
	runs := []*run{
		parse(".", guest{kernel: "6.1", arch: "amd64", mask: 0x1fff}, "6.1.0-50"),
		parse(".", guest{kernel: "6.12", arch: "amd64", goarch: "386", mask: 0x1ffff}, "6.12.1"),
		{guest: &guest{kernel: "7.3", arch: "arm64", pageSize: size16K}},
	}
	runs[2].fail("(guest)", "no kernel\nat all")
	var b strings.Builder
	writeTable(&b, runs)
	writeSkips(&b, runs)
	writeFailures(&b, runs[2])
	const want = "| kernel | architecture | pages | `UFFDIO_API` offers | passed | skipped | failed |\n" +
		"|---|---|---|---|---|---|---|\n" +
		"| 6.1.0-50 | amd64 | 4K | 0x1fff | 1 | 2 | 2 |\n" +
		"| 6.12.1 | 386 on amd64 | 4K | 0x1ffff | 1 | 2 | 2 |\n" +
		"| 7.3 (did not boot) | arm64 |  |  | 0 | 0 | 1 |\n" +
		"- missing: POISON (Linux 6.6) (amd64 6.1, 386 6.12 on amd64): `. TestB/z`\n" +
		"- no reason given (amd64 6.1, 386 6.12 on amd64): `. TestC`\n" +
		"FAIL arm64 7.3 16K: (guest) (guest)\n    no kernel\n    at all\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestHasWords(t *testing.T) {
	r := &run{guest: &guest{kernel: "6.12", arch: "arm64", pageSize: size16K}}
	for words, want := range map[string]bool{
		"": true, "arm64": true, "6.12 arm64": true, "16K": true,
		"6.1": false, "arm": false, "arm64 6.18": false,
	} {
		if got := r.hasWords(words); got != want {
			t.Errorf("%q: %v", words, got)
		}
	}
}

// Guests that are kept are not run again; those with failures are not kept.
func TestStore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "results.json")
	s, err := openStore(file)
	if err != nil {
		t.Fatal(err)
	}
	good := &run{guest: &guests[0], Release: "6.1.0-50", PageSize: 4096, Features: 0x1fff}
	p := &packageRun{Name: "."}
	p.Write([]byte("\x16=== RUN   TestA\n    a_test.go:1: missing: x\n\x16--- SKIP: TestA (0.00s)\n"))
	good.Packages = append(good.Packages, p)
	bad := &run{guest: &guests[1]}
	bad.fail("(guest)", "did not boot")
	for key, r := range map[string]*run{"good": good, "bad": bad} {
		if err := s.keep(r, key); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = openStore(file); err != nil {
		t.Fatal(err)
	}
	again := &run{guest: &guests[0]}
	if s.restore(again, "bad") || s.restore(again, "other") || !s.restore(again, "good") {
		t.Error("it is not the good one that was kept")
	}
	var want, got strings.Builder
	for _, w := range []struct {
		to *strings.Builder
		r  *run
	}{{&want, good}, {&got, again}} {
		writeTable(w.to, []*run{w.r})
		writeSkips(w.to, []*run{w.r})
	}
	if got.String() != want.String() {
		t.Errorf("kept\n%s\nwant\n%s", &got, &want)
	}
	if err := os.WriteFile(file, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(file); err == nil {
		t.Error("a file that was cut off is taken")
	}
}
