package vm

import (
	"slices"
	"testing"

	"github.com/go-uffd/uffd/internal/debian"
)

func TestMatchRelease(t *testing.T) {
	for _, test := range []struct {
		pattern, release string
		want             bool
	}{
		{"6.1", "6.1.0-50", true},
		{"6.1", "6.12.117+deb13", false},
		{"6.1", "6.18.15+deb13", false},
		{"6.1", "6.1", true},
		{"6.12", "6.12.117+deb13", true},
		{"6.12.11", "6.12.117+deb13", false},
		{"6", "6.12.117+deb13", true},
		{"5.10", "5.1.0-1", false},
		{"6.5", "6.5.0-0.deb12.4", true},
		{"7.3", "7.3", true},
		{"7.3", "17.3", false},
		{"", "7.3", true},
	} {
		if got := matchRelease(test.pattern, test.release); got != test.want {
			t.Errorf("matchRelease(%q, %q) = %v", test.pattern, test.release, got)
		}
	}
}

func TestKernelPackages(t *testing.T) {
	m, err := FindMachine("arm64", 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"linux-image-6.1.0-50-arm64":             "6.1.0-50",
		"linux-image-6.12.117+deb13-arm64":       "6.12.117+deb13",
		"linux-image-6.5.0-0.deb12.4-arm64":      "6.5.0-0.deb12.4",
		"linux-binary-7.3.4+deb13-arm64":         "7.3.4+deb13",
		"linux-binary-7.3-arm64":                 "7.3",
		"linux-image-6.1.0-50-cloud-arm64":       "",
		"linux-image-6.1.0-50-rt-arm64":          "",
		"linux-image-6.12.117+deb13-arm64-16k":   "",
		"linux-image-6.1.0-50-arm64-unsigned":    "",
		"linux-image-6.1.0-50-arm64-dbg":         "",
		"linux-image-7.4-rc1-arm64":              "",
		"linux-image-arm64":                      "",
		"linux-headers-6.12.117+deb13-arm64":     "",
		"xlinux-image-6.12.117+deb13-arm64":      "",
		"linux-image-6.12.117+deb13-cloud-arm64": "",
	} {
		got := ""
		if match := m.kernelPackages().FindStringSubmatch(name); match != nil {
			got = match[2]
		}
		if got != want {
			t.Errorf("%s: release %q, want %q", name, got, want)
		}
	}
}

func TestSelectKernels(t *testing.T) {
	m, err := FindMachine("amd64", 0)
	if err != nil {
		t.Fatal(err)
	}
	found := []debian.Package{ // as Find sorts them
		{Name: "linux-image-6.19.14+deb13-cloud-amd64", Version: "6.19.14-1"},
		{Name: "linux-binary-6.19.14+deb13-cloud-amd64", Version: "6.19.14-1"},
		{Name: "linux-binary-6.19.13+deb13-cloud-amd64", Version: "6.19.13-1"},
		{Name: "linux-image-6.12.117+deb13-cloud-amd64", Version: "6.12.117-1"},
		{Name: "linux-image-6.1.0-50-cloud-amd64", Version: "6.1.176-1"},
		{Name: "linux-image-6.1.0-47-cloud-amd64", Version: "6.1.170-1"},
	}
	for pattern, want := range map[string][]string{
		"6.1":  {"linux-image-6.1.0-50-cloud-amd64", "linux-image-6.1.0-47-cloud-amd64"},
		"6.19": {"linux-binary-6.19.14+deb13-cloud-amd64", "linux-binary-6.19.13+deb13-cloud-amd64"},
		"6.2":  nil,
	} {
		var got []string
		for _, p := range selectKernels(m, found, pattern) {
			got = append(got, p.Name)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", pattern, got, want)
		}
	}
}
