/* The smallest guest: a byte on the serial port, a line, the end. Start-up time is measured up to that byte, so
 * nothing comes before it. These instructions mean the same in 32-bit and in 64-bit mode, so there is one entry.
 * Words of the command line: none are read; it tries all ways to end, one after the other. */

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18          /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long entry64

.section .text.start, "ax", @progbits
.code32
.globl entry64
entry64:
    mov $0x3f8, %edx
    mov $'!', %al
    outb %al, %dx
    mov $line, %esi
    mov $line_end - line, %ecx
1:  mov (%esi), %al        
    outb %al, %dx
    lea 1(%esi), %esi
    sub $1, %ecx
    jne 1b
    mov $0x600, %edx        /* ACPI sleep control: SLP_TYP 5, SLP_EN */
    mov $0x34, %al
    outb %al, %dx
    mov $0x64, %edx         /* keyboard controller: pulse the reset line */
    mov $0xfe, %al
    outb %al, %dx
2:  hlt
    jmp 2b

line:
    .ascii " hello from a bare guest\r\n"
line_end:
.section .note.GNU-stack, "", @progbits
