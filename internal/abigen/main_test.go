package main

import (
	"strings"
	"testing"
)

func TestComplete(t *testing.T) {
	const macros = `#define _LINUX_USERFAULTFD_H 
#define UFFD_API ((__u64)0xAA)
#define UFFDIO 0xAA
#define _UFFDIO_COPY (0x03)
#define UFFDIO_COPY _IOWR(UFFDIO, _UFFDIO_COPY, struct uffdio_copy)
#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PAGE_SIZE 4096
`
	const printed = `# const UFFD_COMMENT 0x1
sizeof uffdio_copy 40
const UFFD_API 0xaa
const UFFDIO 0xaa
const _UFFDIO_COPY 0x3
request UFFDIO_COPY 0xc028aa03
request USERFAULTFD_IOC_NEW 0x0000aa00
const PM_SCAN_WP_MATCHING 0x1
`
	tests := []struct {
		name            string
		printed, macros string
		wrong           []string // the names that the error has; none: no error
	}{
		{"complete", printed, macros, nil},
		{"a new constant", printed, macros + "#define UFFD_FEATURE_NEW (1<<63)\n", []string{"UFFD_FEATURE_NEW"}},
		{"a new ioctl", printed, macros + "#define _UFFDIO_NEW (0x0B)\n#define UFFDIO_NEW _IO(UFFDIO, _UFFDIO_NEW)\n", []string{"_UFFDIO_NEW", " UFFDIO_NEW"}},
		{"new page categories and flags", printed, macros + "#define PAGE_IS_NEW 1\n#define PM_SCAN_NEW 2\n", []string{"PAGE_IS_NEW", "PM_SCAN_NEW"}},
		{"a constant that is gone", printed + "const UFFD_GONE 0x1\nrequest UFFDIO_GONE 0x1\n", macros, []string{"UFFD_GONE", "UFFDIO_GONE"}},
		{"nothing printed", "", macros, []string{"UFFD_API", "USERFAULTFD_IOC_NEW", "PM_SCAN_WP_MATCHING"}},
	}
	for _, test := range tests {
		err := complete([]byte(test.printed), []byte(test.macros))
		if (err != nil) != (len(test.wrong) > 0) {
			t.Errorf("%s: got %v", test.name, err)
			continue
		}
		for _, name := range test.wrong {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %q does not name %s", test.name, err, name)
			}
		}
	}
}
