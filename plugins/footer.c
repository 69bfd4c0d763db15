/*
 *  footer - add a few lines to the end of each outgoing plain text mail.
 *
 *      cc -shared -fPIC -O2 -fvisibility=hidden -I../include -o footer.so footer.c
 *
 *  The pattern: change the body of outgoing mail. In mq_smtp_out_data, MQ_Mime is the mail to
 *  send, and MQ_SetMime replaces it for this attempt only. The message in the queue keeps its
 *  body, so a retry starts from there and the footer is added once. mailerq signs (DKIM) and
 *  dot-stuffs the mail after the plugins changed it.
 *
 *      FOOTER_TEXT="line\nline"    the text to add ("\n" starts a new line); empty: nothing
 *
 *  Some mail is left unchanged, because an edit could break it:
 *
 *  - mail that is not text/plain, above all multipart mail: the right part is unknown
 *  - base64 and quoted-printable: the text would have to be decoded first
 *  - signed mail (DKIM, ARC, or PGP in the text): the signature would become invalid
 *  - mail whose charset or encoding cannot hold the footer: an ASCII footer fits all charsets
 *    of plain text; any other footer is UTF-8 and needs a mail in UTF-8 that is sent as 8bit
 *  - mail that already ends with this footer, as after MQ_Retry of another plugin
 */
#define _POSIX_C_SOURCE 200809L
#include <mailerq.h>

#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char standard[] = "-- \\nSent with mailerq";

static char *footer;            /* with CRLF at the end of each line; NULL: nothing to add */
static size_t footer_size;
static bool footer_is_ascii;

/** A borrowed piece of a string. */
struct slice
{
    const char *start;
    size_t size;
};

MQ_EXPORT int mq_version(void)
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize(void)
{
    const char *text = getenv("FOOTER_TEXT");
    if (!text) text = standard;
    if (!*text) return;
    /* At worst each character becomes CRLF; then follow the last CRLF and NUL. */
    footer = malloc(2 * strlen(text) + 3);
    if (!footer) return;
    footer_is_ascii = true;
    char *end = footer;
    for (const char *next = text; *next; next++)
    {
        bool escaped = next[0] == '\\' && next[1] == 'n';
        if (escaped) next++;
        if (escaped || *next == '\n')
        {
            *end++ = '\r';
            *end++ = '\n';
        }
        else if (*next != '\r')
        {
            if ((unsigned char)*next > 127) footer_is_ascii = false;
            *end++ = *next;
        }
    }
    *end++ = '\r';
    *end++ = '\n';
    *end = '\0';
    footer_size = (size_t)(end - footer);
}

MQ_EXPORT void mq_cleanup(void)
{
    free(footer);
    footer = NULL;
}

/**
 *  The end of the line that starts here: the byte after its LF, or the end of the text.
 */
static const char *line_end(const char *start, const char *end)
{
    const char *found = memchr(start, '\n', (size_t)(end - start));
    return found ? found + 1 : end;
}

static bool is_empty_line(const char *start, const char *end)
{
    if (start < end && *start == '\r') start++;
    return start < end && *start == '\n';
}

/**
 *  The start of the body, after the first empty line; NULL if there is none.
 */
static const char *find_body(const char *mime, const char *end)
{
    for (const char *line = mime; line < end; line = line_end(line, end))
    {
        if (is_empty_line(line, end)) return line_end(line, end);
    }
    return NULL;
}

/**
 *  The value of the first header field of this name, including continuation lines. `start` is
 *  NULL if there is no such field.
 */
static struct slice find_header(const char *mime, const char *body, const char *name)
{
    struct slice value = {NULL, 0};
    size_t size = strlen(name);
    for (const char *line = mime; line < body; line = line_end(line, body))
    {
        if ((size_t)(body - line) <= size || strncasecmp(line, name, size) != 0) continue;
        if (line[size] != ':') continue;
        const char *end = line_end(line, body);
        while (end < body && (*end == ' ' || *end == '\t')) end = line_end(end, body);
        value.start = line + size + 1;
        value.size = (size_t)(end - value.start);
        return value;
    }
    return value;
}

static bool is_space(char byte)
{
    return byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n';
}

/**
 *  Whether a value starts with a token: "text/plain; charset=utf-8" starts with "text/plain".
 */
static bool starts_with_token(struct slice value, const char *token)
{
    while (value.size && is_space(*value.start)) value.start++, value.size--;
    size_t size = strlen(token);
    if (value.size < size || strncasecmp(value.start, token, size) != 0) return false;
    return value.size == size || value.start[size] == ';' || is_space(value.start[size]);
}

/**
 *  Whether the content type names the charset UTF-8.
 */
static bool is_utf8(struct slice type)
{
    static const char *const forms[] = {"charset=utf-8", "charset=\"utf-8\""};
    for (size_t i = 0; i < type.size; i++)
    {
        for (size_t form = 0; form < sizeof forms / sizeof *forms; form++)
        {
            size_t size = strlen(forms[form]);
            if (type.size - i < size) continue;
            if (strncasecmp(type.start + i, forms[form], size) == 0) return true;
        }
    }
    return false;
}

static bool contains_line(const char *start, const char *end, const char *text)
{
    size_t size = strlen(text);
    for (const char *line = start; line < end; line = line_end(line, end))
    {
        if ((size_t)(end - line) >= size && memcmp(line, text, size) == 0) return true;
    }
    return false;
}

/**
 *  Whether the footer may be added; the comment at the top lists the conditions.
 */
static bool may_add(const char *mime, const char *body, const char *end)
{
    if (find_header(mime, body, "DKIM-Signature").start) return false;
    if (find_header(mime, body, "ARC-Message-Signature").start) return false;
    if (contains_line(body, end, "-----BEGIN PGP")) return false;

    /* Mail without these fields is plain text in 7-bit ASCII (RFC 2045, 5.2 and 6.1). */
    struct slice type = find_header(mime, body, "Content-Type");
    struct slice encoding = find_header(mime, body, "Content-Transfer-Encoding");
    if (type.start && !starts_with_token(type, "text/plain")) return false;
    bool is_8bit = encoding.start && starts_with_token(encoding, "8bit");
    if (encoding.start && !is_8bit && !starts_with_token(encoding, "7bit")) return false;
    if (!footer_is_ascii && !(is_8bit && type.start && is_utf8(type))) return false;

    size_t size = (size_t)(end - body);
    return size < footer_size || memcmp(end - footer_size, footer, footer_size) != 0;
}

MQ_EXPORT bool mq_smtp_out_data(MQ_Context *context, MQ_SmtpConnection *connection,
                                MQ_Message *message)
{
    (void)context;
    (void)connection;
    const char *mime = MQ_Mime(message);
    if (!footer || !mime) return false;
    size_t size = MQ_MimeSize(message);
    const char *end = mime + size;
    const char *body = find_body(mime, end);
    if (!body || !may_add(mime, body, end)) return false;

    /* The last line of a body may lack its CRLF. */
    bool complete = end == body || end[-1] == '\n';
    size_t total = size + (complete ? 0 : 2) + footer_size;
    char *changed = malloc(total);
    if (!changed)
    {
        MQ_Log(MQ_WARN, "no memory for a footer, the mail goes out without");
        return false;
    }
    char *next = changed;
    memcpy(next, mime, size);
    next += size;
    if (!complete)
    {
        memcpy(next, "\r\n", 2);
        next += 2;
    }
    memcpy(next, footer, footer_size);
    /* MQ_SetMime copies. Afterwards `mime` is no longer valid. */
    MQ_SetMime(message, changed, total);
    free(changed);
    return false;
}
